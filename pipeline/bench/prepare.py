"""``bench prepare``: throughput of our preparation and of a plain Pillow process pool.

Both read the same class tars. Both decode and check every image, scale it to a short side of 256
pixels, encode it, hash it and write it. That is all that the pool does: one file per image. Our
preparation also surveys the source, drops duplicates, shuffles the classes into shards with an
index, syncs and digests the shards, and writes the description of the dataset. The start of the
processes is not counted.
"""

from __future__ import annotations

import io
import json
import sys
import tarfile
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import TypedDict, cast

import pyarrow as pa
import xxhash
from PIL import Image as Pillow

from pipeline.bench.photographs import photographs, write_class_tars
from pipeline.bench.workers import PoolTasks, run_and_report, serially, silent
from pipeline.config.schema import DatasetConfig
from pipeline.files import write_json
from pipeline.prepare.build import prepare_dataset
from pipeline.prepare.map_tasks import MapTasks

SHORT_SIDE = 256  # pixels
TARS = 25  # at most; with the default settings about 120 images each
START_SECONDS = 0.5  # how long a new process stays busy, so that the others start too


@dataclass(frozen=True, kw_only=True)
class PrepareCase:
    """One case. One worker means no pool: the work is done in the process itself.

    preparer: "ours" or "pillow".
    source: a folder of class tars.
    """

    preparer: str
    workers: int
    source: str
    shard_rows: int


class PrepareMetrics(TypedDict):
    """Result of one case, as measured in its process."""

    preparer: str
    workers: int
    images: int
    images_per_s: float
    images_per_s_per_core: float


class PrepareResult(PrepareMetrics):
    """Result of one case, with the memory of its process and the number of its round."""

    peak_mb: float
    round: int


def measure(case: PrepareCase) -> PrepareMetrics:
    """Measure one case in this process and its pool."""
    config = DatasetConfig(
        root=case.source, short_side=SHORT_SIDE, shard_rows=case.shard_rows, max_rejected=0.1
    )
    with ExitStack() as stack:
        target = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        tasks: MapTasks = serially
        if case.workers > 1:
            # forkserver: forking this process, which has threads of its own, is not safe.
            pool = stack.enter_context(ProcessPoolExecutor(case.workers, get_context("forkserver")))
            tasks = PoolTasks(pool)
        # Start all processes before the clock: one short task per worker.
        for _ in tasks(_start, [START_SECONDS] * case.workers):
            pass
        prepare = _ours if case.preparer == "ours" else _pillow
        begin = time.perf_counter()
        images = prepare(config, target, tasks)
        seconds = time.perf_counter() - begin
    rate = images / seconds
    return {
        "preparer": case.preparer,
        "workers": case.workers,
        "images": images,
        "images_per_s": rate,
        "images_per_s_per_core": rate / case.workers,
    }


def _start(seconds: float) -> None:
    """Keep a process busy while the others start, with everything imported that the work needs."""
    pa.array([0])  # the first array imports pandas where it is installed
    time.sleep(seconds)


def _ours(config: DatasetConfig, target: Path, tasks: MapTasks) -> int:
    metrics = prepare_dataset(
        "bench", config, target / "dataset", 0, tasks=tasks, progress=silent, log=silent
    )
    return int(metrics["images"] + metrics["validation"])


def _pillow(config: DatasetConfig, target: Path, tasks: MapTasks) -> int:
    tars = sorted(Path(config.root).rglob("*.tar"))
    return sum(images for _, images in tasks(partial(pillow_tar, config, target), tars))


def pillow_tar(config: DatasetConfig, target: Path, tar: Path) -> int:
    """Write the images of one tar, each into a file named by its hash. Returns their number."""
    folder = target / tar.stem
    folder.mkdir(exist_ok=True)
    images = 0
    with tarfile.open(tar) as archive:
        for member in archive:
            file = archive.extractfile(member)
            if file is not None:
                data = pillow_image(file.read(), SHORT_SIDE, config.jpeg_quality)
                (folder / f"{xxhash.xxh3_128_hexdigest(data)}.jpg").write_bytes(data)
                images += 1
    return images


def pillow_image(data: bytes, short_side: int, quality: int) -> bytes:
    """Decode, check, shrink and encode one image like our preparation.

    Quality and colour resolution are equal. The filter is Pillow's default, bicubic: of its
    filters, the one whose images are closest to ours (area averaging).
    """
    with Pillow.open(io.BytesIO(data)) as opened:
        image = opened.convert("RGB")  # decodes the whole image, or raises
    # Small images keep their bytes, as in our preparation.
    if min(image.size) <= short_side:
        return data
    scale = short_side / min(image.size)
    width = round(image.width * scale)
    height = round(image.height * scale)
    out = io.BytesIO()
    image.resize((width, height)).save(out, "JPEG", quality=quality, subsampling="4:4:4")
    return out.getvalue()


def ratios(results: Sequence[PrepareResult]) -> dict[str, float]:
    """Ratios of throughput, from the best round of each case.

    per_core: ours to Pillow, at one worker. scaling: ours, two workers to one. pillow_scaling: the
    same for Pillow.
    """
    # The best round, because other processes on the machine can only slow a round down.
    rates: dict[tuple[str, int], float] = {}
    for result in results:
        key = (result["preparer"], result["workers"])
        rates[key] = max(rates.get(key, 0.0), result["images_per_s"])
    return {
        "per_core": rates["ours", 1] / rates["pillow", 1],
        "scaling": rates["ours", 2] / rates["ours", 1],
        "pillow_scaling": rates["pillow", 2] / rates["pillow", 1],
    }


def table(results: Sequence[PrepareResult]) -> str:
    """The metrics and ratios as text."""
    lines = ["preparer  workers  images  images/s  per core  peak MiB"]
    lines += [
        f"{result['preparer']:<9} {result['workers']:>7} {result['images']:>7} "
        f"{result['images_per_s']:>9.1f} {result['images_per_s_per_core']:>9.1f} "
        f"{result['peak_mb']:>9.0f}"
        for result in results
    ]
    values = ratios(results)
    lines += [
        f"images/s of ours / pillow, 1 worker: {values['per_core']:.2f}",
        f"images/s of 2 workers / 1 worker: ours {values['scaling']:.2f}, "
        f"pillow {values['pillow_scaling']:.2f}",
    ]
    return "\n".join(lines)


def main(
    json_path: Path | None = None, images: int = 500, copies: int = 6, rounds: int = 2
) -> dict[str, object]:
    """Measure both with 1 and 2 workers, print a table, and write the results to ``json_path``.

    Args:
        images: photographs. copies: classes that each of them is copied to.
        rounds: how often each case is measured; the cases take turns.
    """
    results: list[PrepareResult] = []
    with tempfile.TemporaryDirectory() as temporary:
        originals = photographs(images)
        # The photographs have more classes than a fair comparison needs tars: divide them among
        # the first TARS classes.
        classes = sorted({image.wnid for image in originals})[:TARS]
        source = [
            replace(image, wnid=classes[i % len(classes)]) for i, image in enumerate(originals)
        ]
        write_class_tars(source, Path(temporary), copies)
        # About eight shards, so that two workers share the work evenly.
        shard_rows = max(1, len(source) * copies // 8)
        for number in range(rounds):
            for workers in (1, 2):
                for preparer in ("ours", "pillow"):
                    case = PrepareCase(
                        preparer=preparer,
                        workers=workers,
                        source=temporary,
                        shard_rows=shard_rows,
                    )
                    results.append(_run(case, number))
    report: dict[str, object] = {"cases": results, "ratios": ratios(results)}
    print(table(results))
    if json_path is not None:
        write_json(json_path, report)
    return report


def _run(case: PrepareCase, number: int) -> PrepareResult:
    """Measure a case in a new process, and report it on stderr."""
    title = f"{case.preparer}, {case.workers} workers"
    metrics = run_and_report("pipeline.bench.prepare", asdict(case), title)
    return cast(PrepareResult, metrics | {"round": number})


if __name__ == "__main__":
    print(json.dumps(measure(PrepareCase(**json.loads(sys.argv[1])))))
