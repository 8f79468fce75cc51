"""``bench loader``: images per second and memory of our loader and the usual ones, one process a case, side by side in one run.

All read the same JPEGs from files that are cached in memory, and deliver the same kind of batches (`pipeline.bench.loaders`).
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from pipeline.bench.loaders import LOADERS, Load, lay_out
from pipeline.bench.photographs import photographs, write_class_tars
from pipeline.bench.workers import run_case, serially
from pipeline.config.schema import DatasetConfig
from pipeline.files import write_json
from pipeline.prepare.dataset import prepare_dataset

BASELINE = "pillow"
SOURCES = ("original", "256")  # as they are; short side 256 pixels, re-encoded by the preparation
RECIPES = ("crop_flip", "full")
COMPARED = 2  # workers at which ratios are taken


@dataclass(frozen=True)
class Case:
    """One measurement: seconds that count, after some that do not."""

    loader: str
    source: str
    load: Load
    seconds: float
    warm_up: float


def measure(case: Case) -> dict[str, Any]:
    """Figures of one case."""
    torch.set_num_threads(1)  # workers are the parallelism
    batches = LOADERS[case.loader](case.load)
    next(batches)
    _draw(batches, case.warm_up)
    images, seconds = _draw(batches, case.seconds)
    return {
        "loader": case.loader, "workers": case.load.workers, "source": case.source, "recipe": case.load.recipe,
        "images_per_s": images / seconds,
    }  # fmt: skip


def _draw(batches: Any, least: float) -> tuple[int, float]:
    """Images drawn in whole batches for at least so many seconds, and the seconds that it took."""
    images, begin = 0, time.perf_counter()
    while True:
        images += len(next(batches)[0])
        seconds = time.perf_counter() - begin
        if seconds >= least:
            return images, seconds


def prepare_sources(directory: Path, count: int, sources: Sequence[str] = SOURCES) -> int:
    """Lay out the images below ``directory/<source>``; returns how many there are to draw from."""
    write_class_tars(photographs(count), directory / "class_tars")
    images = 0
    for source in sources:
        config = DatasetConfig(
            root=str(directory / "class_tars"), short_side="keep" if source == "original" else int(source), max_rejected=0.1
        )
        target = directory / source / "dataset"
        figures = prepare_dataset("bench", config, target, 0, serially, lambda *_: None, lambda *_: None)
        lay_out(directory / source)
        images = int(figures["images"])
    return images


def compared(cases: Sequence[dict[str, Any]], figure: str) -> dict[str, float]:
    """``figure`` of ours divided by the baseline's at COMPARED workers, by source and recipe."""
    own = {(c["loader"], c["source"], c["recipe"]): c[figure] for c in cases if c["workers"] == COMPARED}
    return {
        f"{source}/{recipe}": own["ours", source, recipe] / own[BASELINE, source, recipe]
        for loader, source, recipe in own
        if loader == "ours" and (BASELINE, source, recipe) in own
    }


def table(cases: Sequence[dict[str, Any]]) -> str:
    """The figures, and the ratio of the images per second to the baseline's with as many workers."""
    lines = [f"loader       workers  source    recipe     images/s  peak MiB  x {BASELINE}"]
    rates = {(c["loader"], c["workers"], c["source"], c["recipe"]): c["images_per_s"] for c in cases}
    for c in cases:
        baseline = rates.get((BASELINE, c["workers"], c["source"], c["recipe"]), float("nan"))
        lines.append(
            f"{c['loader']:<12} {c['workers']:>7}  {c['source']:<9} {c['recipe']:<9} {c['images_per_s']:>9.1f} "
            f"{c['peak_mb']:>9.0f} {c['images_per_s'] / baseline:>9.2f}"
        )
    speed, memory = compared(cases, "images_per_s"), compared(cases, "peak_mb")
    lines += [f"{key}: {speed[key]:.2f} x {BASELINE} at {COMPARED} workers, {memory[key]:.2f} x its memory" for key in speed]
    return "\n".join(lines)


def main(
    json_path: Path | None = None,
    images: int = 500,
    seconds: float = 7.0,
    warm_up: float = 2.0,
    loaders: Sequence[str] = tuple(LOADERS),
    workers: Sequence[int] = (1, 2),
    sources: Sequence[str] = SOURCES,
    recipes: Sequence[str] = RECIPES,
    **options: Any,
) -> dict[str, Any]:
    """Measure every combination (``options``: further fields of ``Load``), print a table, write JSON."""
    cases = []
    with tempfile.TemporaryDirectory() as temporary:
        drawn_from = prepare_sources(Path(temporary), images, sources)
        for source in sources:
            for recipe in recipes:
                for number in workers:
                    load = Load(f"{temporary}/{source}", recipe, number, **options)
                    for loader in loaders:  # next to each other: the machine's moods hit all of them
                        case = Case(loader, source, load, seconds, warm_up)
                        cases.append(run_case("pipeline.bench.loader", asdict(case)))
                        rate = f"{cases[-1]['images_per_s']:.1f} images/s"
                        print(f"{loader} {number} {source} {recipe}: {rate}", file=sys.stderr, flush=True)
    ratios = {"ratios": compared(cases, "images_per_s"), "memory_ratios": compared(cases, "peak_mb")}
    result = {"cases": cases, **ratios, "baseline": BASELINE, "images": drawn_from, "torch": torch.__version__}
    print(table(cases))
    if json_path is not None:
        write_json(json_path, result)
    return result


if __name__ == "__main__":
    arguments = json.loads(sys.argv[1])
    print(json.dumps(measure(Case(**(arguments | {"load": Load(**arguments["load"])})))))
