"""``bench loader``: throughput and memory of our loader and the usual ones, side by side.

Every case (loader, images, recipe, number of workers) runs in a process of its own, and the loaders
of one comparison run one after the other. All of them read the same JPEGs, from files that are
cached in memory. The metrics are:

- ``images_per_s``: batches as the loader hands them over. What is left for the device differs from
  loader to loader (`pipeline.bench.loaders`).
- ``finished_images_per_s``: with the device's part done too, on the same CPU cores, so that all
  loaders deliver the same.
- ``peak_mb``: memory of the whole case (`pipeline.bench.workers.run_case`).
"""

from __future__ import annotations

import itertools
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, TypedDict, cast

import torch

from pipeline.bench.loaders import LOADERS, PACKAGES, Workload, write_layouts
from pipeline.bench.photographs import photographs, write_class_tars
from pipeline.bench.requirements import require
from pipeline.bench.workers import run_and_report, serially, silent
from pipeline.config.schema import DatasetConfig
from pipeline.files import write_json
from pipeline.prepare.build import prepare_dataset

BASELINE = "pillow"
SOURCES = ("original", "256")  # unchanged; or short side 256 pixels, encoded by the preparation
RECIPES = ("crop_flip", "full")
RATIO_WORKERS = 2  # number of workers at which ratios to the baseline are taken

Metric = Literal["images_per_s", "finished_images_per_s", "peak_mb"]
# Name in the JSON file, metric, name on the screen.
RATIOS: tuple[tuple[str, Metric, str], ...] = (
    ("ratios", "images_per_s", "images/s"),
    ("finished_ratios", "finished_images_per_s", "finished/s"),
    ("memory_ratios", "peak_mb", "peak memory"),
)


@dataclass(frozen=True, kw_only=True)
class LoaderCase:
    """One case. ``seconds`` are measured after ``warm_up`` seconds that are not."""

    loader: str
    source: str
    work: Workload
    seconds: float
    warm_up: float


class LoaderMetrics(TypedDict):
    """Result of one case, as measured in its process."""

    loader: str
    workers: int
    source: str
    recipe: str
    images_per_s: float
    finished_images_per_s: float


class LoaderResult(LoaderMetrics):
    """Result of one case, with the memory of its process."""

    peak_mb: float


def measure(case: LoaderCase) -> LoaderMetrics:
    """Measure one case in this process."""
    torch.set_num_threads(1)  # the workers are the parallelism
    source = LOADERS[case.loader](case.work)
    with closing(source.batches) as batches:
        # The first batch waits for the workers to start, which is not part of the throughput.
        next(batches)

        def rate(deliver: Callable[[], object], share: float) -> float:
            _repeat(deliver, case.warm_up * share)
            calls, seconds = _repeat(deliver, case.seconds * share)
            return calls * case.work.batch / seconds

        # The second rate gets half the time: it is shown for comparison only.
        handed_over = rate(lambda: next(batches), 1.0)
        finished = rate(lambda: source.finish(next(batches)), 0.5)
    return {
        "loader": case.loader,
        "workers": case.work.workers,
        "source": case.source,
        "recipe": case.work.recipe,
        "images_per_s": handed_over,
        "finished_images_per_s": finished,
    }


def _repeat(function: Callable[[], object], min_seconds: float) -> tuple[int, float]:
    """Call a function, at least once, until ``min_seconds`` are over: (calls, seconds)."""
    # Count whole calls: the time of a call that is under way when the time is over counts too.
    begin = time.perf_counter()
    calls = 0
    while True:
        function()
        calls += 1
        seconds = time.perf_counter() - begin
        if seconds >= min_seconds:
            return calls, seconds


def prepare_sources(directory: Path, count: int, sources: Sequence[str] = SOURCES) -> int:
    """Write the images in all layouts below ``directory/<source>``.

    Args:
        count: photographs to prepare.
    Returns:
        The number of training images.
    """
    write_class_tars(photographs(count), directory / "class_tars")
    images = 0
    for source in sources:
        # A bad photograph must not stop the benchmark: allow 10% instead of the default.
        config = DatasetConfig(
            root=str(directory / "class_tars"),
            short_side="keep" if source == "original" else int(source),
            max_rejected=0.1,
        )
        target = directory / source / "dataset"
        metrics = prepare_dataset(
            "bench", config, target, 0, tasks=serially, progress=silent, log=silent
        )
        write_layouts(directory / source)
        images = int(metrics["images"])
    return images


def compare(results: Sequence[LoaderResult], metric: Metric) -> dict[str, float]:
    """``metric`` of our loader divided by the baseline's, per "source/recipe"."""
    values = {
        (result["loader"], result["source"], result["recipe"]): result[metric]
        for result in results
        if result["workers"] == RATIO_WORKERS
    }
    return {
        f"{source}/{recipe}": value / values[BASELINE, source, recipe]
        for (loader, source, recipe), value in values.items()
        if loader == "ours" and (BASELINE, source, recipe) in values
    }


def table(results: Sequence[LoaderResult]) -> str:
    """The metrics as text, with the ratio of both rates to the baseline's at as many workers."""
    lines = [
        f"loader       workers  source    recipe     images/s  vs {BASELINE}"
        f"  finished/s  vs {BASELINE}  peak MiB"
    ]
    baselines = {
        (result["workers"], result["source"], result["recipe"]): result
        for result in results
        if result["loader"] == BASELINE
    }
    for result in results:
        baseline = baselines.get((result["workers"], result["source"], result["recipe"]))
        ratio = float("nan")
        finished_ratio = float("nan")
        if baseline is not None:
            ratio = result["images_per_s"] / baseline["images_per_s"]
            finished_ratio = result["finished_images_per_s"] / baseline["finished_images_per_s"]
        lines.append(
            f"{result['loader']:<12} {result['workers']:>7}  {result['source']:<9} "
            f"{result['recipe']:<9} {result['images_per_s']:>9.1f} {ratio:>10.2f} "
            f"{result['finished_images_per_s']:>11.1f} {finished_ratio:>10.2f} "
            f"{result['peak_mb']:>9.0f}"
        )
    lines += [
        "images/s: batches as the loader hands them over",
        "finished/s: the same after the device's part of the work, done on the CPU",
        f"vs {BASELINE}: ratio to {BASELINE} with as many workers",
        "peak MiB: memory of all processes of the loader",
    ]
    for _, metric, title in RATIOS:
        ratios = compare(results, metric)
        listed = ", ".join(f"{key} {value:.2f}" for key, value in ratios.items())
        lines.append(f"{title}, ours / {BASELINE} at {RATIO_WORKERS} workers: {listed}")
    return "\n".join(lines)


def main(
    json_path: Path | None = None,
    *,
    images: int = 500,
    seconds: float = 5.0,
    warm_up: float = 1.0,
    loaders: Sequence[str] = tuple(LOADERS),
    workers: Sequence[int] = (1, 2),
    sources: Sequence[str] = SOURCES,
    recipes: Sequence[str] = RECIPES,
    batch: int = 64,
    image_size: int = 224,
) -> dict[str, object]:
    """Measure every combination, print a table, and write the results to ``json_path``.

    Raises:
        ConfigError: if a package that a loader needs is not installed.
    """
    require("loader", [package for loader in loaders for package in PACKAGES.get(loader, ())])

    def cases(directory: str) -> Iterator[LoaderCase]:
        # The loader varies fastest, so that a slow phase of the machine affects all of them.
        combinations = itertools.product(sources, recipes, workers, loaders)
        for source, recipe, number, loader in combinations:
            work = Workload(
                directory=f"{directory}/{source}",
                recipe=recipe,
                workers=number,
                batch=batch,
                image_size=image_size,
            )
            yield LoaderCase(
                loader=loader, source=source, work=work, seconds=seconds, warm_up=warm_up
            )

    with tempfile.TemporaryDirectory() as temporary:
        image_count = prepare_sources(Path(temporary), images, sources)
        results = [_run(case) for case in cases(temporary)]
    report = {
        "cases": results,
        **{name: compare(results, metric) for name, metric, _ in RATIOS},
        "baseline": BASELINE,
        "images": image_count,
        "torch": torch.__version__,
    }
    print(table(results))
    if json_path is not None:
        write_json(json_path, report)
    return report


def _run(case: LoaderCase) -> LoaderResult:
    """Measure a case in a new process, and report it on stderr."""
    title = f"{case.loader}, {case.work.workers} workers, {case.source}, {case.work.recipe}"
    return cast(LoaderResult, run_and_report("pipeline.bench.loader", asdict(case), title))


if __name__ == "__main__":
    arguments = json.loads(sys.argv[1])
    work = Workload(**arguments.pop("work"))
    print(json.dumps(measure(LoaderCase(work=work, **arguments))))
