"""``bench published``: an evaluation's batches of the published pixels, from us and from timm.

Both give the same pixels of the same files (see ``pipeline.data.preprocessing``): decoded in full,
resized by Pillow's bicubic filter, normalised, in float32. This loader decodes in threads and
leaves the normalisation to the device; timm's does everything in worker processes. The time of a
pass includes the start of neither: it begins at the second batch.
"""

from __future__ import annotations

import importlib
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypedDict, cast

import torch

from pipeline.bench.loader import prepare_sources
from pipeline.bench.requirements import require
from pipeline.bench.workers import run_and_report
from pipeline.config.schema import AugmentConfig
from pipeline.data.dataset import open_dataset
from pipeline.data.device import DeviceAugment
from pipeline.data.loader import EvalLoader
from pipeline.data.preprocessing import MEAN, STD, Preprocessing
from pipeline.files import write_json
from pipeline.runtime.torchvision_import import import_torchvision

LOADERS = ("ours", "timm")
CROP = 0.875  # share of the short side, as published


@dataclass(frozen=True, kw_only=True)
class PublishedCase:
    """One pass. ``directory``: as ``prepare_sources`` writes it; ``workers``: threads or processes.

    The other fields count images, or pixels of the side of one.
    """

    loader: str
    directory: str
    workers: int
    batch: int
    image_size: int


class PublishedResult(TypedDict):
    """Result of one pass, in normalised images."""

    loader: str
    workers: int
    images: int
    images_per_s: float


def measure(case: PublishedCase) -> PublishedResult:
    """Measure one pass in this process."""
    torch.set_num_threads(1)  # the workers are the parallelism
    counts = _ours(case) if case.loader == "ours" else _timm(case)
    # The first batch waits for the workers to start.
    next(counts)
    begin = time.perf_counter()
    images = sum(counts)
    return {
        "loader": case.loader,
        "workers": case.workers,
        "images": images,
        "images_per_s": images / (time.perf_counter() - begin),
    }


def _ours(case: PublishedCase) -> Iterator[int]:
    """Images of each batch, once it is normalised."""
    data = open_dataset(Path(case.directory) / "dataset")
    normalise = DeviceAugment(AugmentConfig(), len(data.classes), 0, train=False)
    with EvalLoader(
        data.split("train"),
        preprocessing=Preprocessing(case.image_size, "published"),
        batch=case.batch,
        threads=case.workers,
    ) as loader:
        for batch in loader:
            # Nothing is mixed or erased, so labels, views and positions do not matter.
            given = batch.labels
            yield len(normalise(batch.images, given, given, given, 0).images)


def _timm(case: PublishedCase) -> Iterator[int]:
    import_torchvision()  # timm imports it
    timm = importlib.import_module("timm.data")
    # Without its prefetcher, which is for CUDA, the workers normalise.
    loader = timm.create_loader(
        timm.ImageDataset(str(Path(case.directory) / "files")),
        input_size=(3, case.image_size, case.image_size),
        batch_size=case.batch,
        is_training=False,
        use_prefetcher=False,
        interpolation="bicubic",
        mean=MEAN,
        std=STD,
        num_workers=case.workers,
        crop_pct=CROP,
        pin_memory=False,
    )
    for images, _ in loader:
        yield len(images)


def main(
    json_path: Path | None = None,
    *,
    images: int = 500,
    rounds: int = 3,
    workers: Sequence[int] = (1, 2),
    batch: int = 32,
    image_size: int = 224,
) -> dict[str, object]:
    """Measure, print the ratios, and write the results to ``json_path``.

    Raises:
        ConfigError: a package is not installed.
    """
    # Before the photographs are prepared, which takes a minute.
    require("published", ["timm"])
    with tempfile.TemporaryDirectory() as temporary:
        prepare_sources(Path(temporary), images, ["original"])
        # The loader varies fastest, so that a slow phase of the machine affects both.
        results = [
            _run(
                PublishedCase(
                    loader=loader,
                    directory=f"{temporary}/original",
                    workers=number,
                    batch=batch,
                    image_size=image_size,
                )
            )
            for number in workers
            for _ in range(rounds)
            for loader in LOADERS
        ]
    ratios = {f"{number} workers": _ratio(results, number) for number in workers}
    for name, ratio in ratios.items():
        print(f"published pixels, images/s of ours / timm, {name}: {ratio:.2f}")
    report: dict[str, object] = {"cases": results, "ratios": ratios, "torch": torch.__version__}
    if json_path is not None:
        write_json(json_path, report)
    return report


def _run(case: PublishedCase) -> PublishedResult:
    """Measure a case in a new process, and report it on stderr."""
    title = f"{case.loader}, {case.workers} workers"
    return cast(PublishedResult, run_and_report("pipeline.bench.published", asdict(case), title))


def _ratio(results: Sequence[PublishedResult], workers: int) -> float:
    # Medians: one slow pass of either must not decide.
    ours, timm = (
        statistics.median(
            result["images_per_s"]
            for result in results
            if result["loader"] == loader and result["workers"] == workers
        )
        for loader in LOADERS
    )
    return ours / timm


if __name__ == "__main__":
    print(json.dumps(measure(PublishedCase(**json.loads(sys.argv[1])))))
