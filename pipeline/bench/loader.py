"""``bench loader``: images per second and memory of our loader and the usual ones, one process a case, side by side in one run.

All read the same JPEGs from files that are cached in memory. ``images_per_s``: batches handed over, ready for the device's
work, which differs (`pipeline.bench.loaders`); ``finished_images_per_s``: with that work done too, on these CPU cores, so
that all deliver the same. ``peak_mb`` is of the whole case (`pipeline.bench.workers.run_case`).
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from pipeline.bench.loaders import LOADERS, Load, lay_out
from pipeline.bench.photographs import photographs, write_class_tars
from pipeline.bench.workers import run_case, serially
from pipeline.config.schema import DatasetConfig
from pipeline.files import write_json
from pipeline.prepare.build import prepare_dataset

BASELINE = "pillow"
SOURCES = ("original", "256")  # as they are; short side 256 pixels, re-encoded by the preparation
RECIPES = ("crop_flip", "full")
COMPARED = 2  # workers at which ratios are taken


@dataclass(frozen=True)
class LoaderCase:
    """One measurement: seconds that count, after some that do not; half as many of both for the second rate."""

    loader: str
    source: str
    load: Load
    seconds: float
    warm_up: float


def measure(case: LoaderCase) -> dict[str, Any]:
    """Figures of one case."""
    torch.set_num_threads(1)  # workers are the parallelism
    delivery = LOADERS[case.loader](case.load)
    with closing(delivery.batches) as batches:
        next(batches)

        def rate(one: Callable[[], Any], share: float) -> float:
            _repeat(one, case.warm_up * share)
            calls, seconds = _repeat(one, case.seconds * share)
            return calls * case.load.batch / seconds

        handed_over = rate(lambda: next(batches), 1.0)
        finished = rate(lambda: delivery.finish(next(batches)), 0.5)
    return {
        "loader": case.loader,
        "workers": case.load.workers,
        "source": case.source,
        "recipe": case.load.recipe,
        "images_per_s": handed_over,
        "finished_images_per_s": finished,
    }


def _repeat(one: Callable[[], Any], least: float) -> tuple[int, float]:
    """Call until so many seconds are over; returns the calls and the seconds that they took."""
    calls, begin = 0, time.perf_counter()
    while True:
        one()
        calls, seconds = calls + 1, time.perf_counter() - begin
        if seconds >= least:
            return calls, seconds


def prepare_sources(directory: Path, count: int, sources: Sequence[str] = SOURCES) -> int:
    """Lay out the images below ``directory/<source>``; returns how many there are to draw from."""
    write_class_tars(photographs(count), directory / "class_tars")
    images = 0
    for source in sources:
        config = DatasetConfig(
            root=str(directory / "class_tars"),
            short_side="keep" if source == "original" else int(source),
            max_rejected=0.1,
        )
        target = directory / source / "dataset"
        figures = prepare_dataset(
            "bench", config, target, 0, serially, lambda *_: None, lambda *_: None
        )
        lay_out(directory / source)
        images = int(figures["images"])
    return images


def compared(cases: Sequence[dict[str, Any]], figure: str) -> dict[str, float]:
    """``figure`` of ours divided by the baseline's at COMPARED workers, by source and recipe."""
    own = {
        (c["loader"], c["source"], c["recipe"]): c[figure]
        for c in cases
        if c["workers"] == COMPARED
    }
    return {
        f"{source}/{recipe}": own["ours", source, recipe] / own[BASELINE, source, recipe]
        for loader, source, recipe in own
        if loader == "ours" and (BASELINE, source, recipe) in own
    }


def table(cases: Sequence[dict[str, Any]]) -> str:
    """The figures, and the ratio of both rates to the baseline's with as many workers."""
    lines = [
        f"loader       workers  source    recipe     images/s  x {BASELINE}  finished/s  x {BASELINE}  peak MiB"
    ]
    baselines = {
        (c["workers"], c["source"], c["recipe"]): c for c in cases if c["loader"] == BASELINE
    }
    for c in cases:
        baseline = baselines.get((c["workers"], c["source"], c["recipe"]), {})
        one, two = (
            c[rate] / baseline.get(rate, float("nan"))
            for rate in ("images_per_s", "finished_images_per_s")
        )
        lines.append(
            f"{c['loader']:<12} {c['workers']:>7}  {c['source']:<9} {c['recipe']:<9} {c['images_per_s']:>9.1f} {one:>9.2f} "
            f"{c['finished_images_per_s']:>11.1f} {two:>9.2f} {c['peak_mb']:>9.0f}"
        )
    for name, ratios in all_ratios(cases).items():
        lines.append(f"{name}, ours to {BASELINE} at {COMPARED} workers: " + _listed(ratios))
    return "\n".join(lines)


def all_ratios(cases: Sequence[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """`compared` for both rates and the memory."""
    figures = {
        "ratios": "images_per_s",
        "finished_ratios": "finished_images_per_s",
        "memory_ratios": "peak_mb",
    }
    return {name: compared(cases, figure) for name, figure in figures.items()}


def _listed(ratios: dict[str, float]) -> str:
    return ", ".join(f"{key} {ratio:.2f}" for key, ratio in ratios.items())


def main(
    json_path: Path | None = None,
    images: int = 500,
    seconds: float = 5.0,
    warm_up: float = 1.0,
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
                    for (
                        loader
                    ) in loaders:  # next to each other: the machine's moods hit all of them
                        case = LoaderCase(loader, source, load, seconds, warm_up)
                        cases.append(run_case("pipeline.bench.loader", asdict(case)))
                        rate = f"{cases[-1]['images_per_s']:.1f} images/s"
                        print(
                            f"{loader} {number} {source} {recipe}: {rate}",
                            file=sys.stderr,
                            flush=True,
                        )
    result = {
        "cases": cases,
        **all_ratios(cases),
        "baseline": BASELINE,
        "images": drawn_from,
        "torch": torch.__version__,
    }
    print(table(cases))
    if json_path is not None:
        write_json(json_path, result)
    return result


if __name__ == "__main__":
    arguments = json.loads(sys.argv[1])
    print(json.dumps(measure(LoaderCase(**(arguments | {"load": Load(**arguments["load"])})))))
