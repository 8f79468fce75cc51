"""``bench prepare``: images per second of our preparation and of a plain Pillow process pool, on the same class tars.

Both decode and check every image, scale it to a short side of 256 pixels, encode it, hash it and write it. The pool then
is done: a file an image. Ours also surveys the source, drops duplicates, mixes the classes into shards with an index, syncs
and digests them, and writes it all down. The start of the processes is not counted.
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
from typing import Any

import pyarrow as pa
import xxhash
from PIL import Image as Pillow

from pipeline.bench.photographs import photographs, write_class_tars
from pipeline.bench.workers import Pooled, run_case, serially
from pipeline.config.schema import DatasetConfig
from pipeline.files import write_json
from pipeline.prepare.build import MapTasks, prepare_dataset

SHORT_SIDE = 256
TARS = 25  # of about 120 images each


@dataclass(frozen=True)
class PrepareCase:
    """One measurement. ``preparer``: ours or pillow; one worker works in the process itself, more in a pool."""

    preparer: str
    workers: int
    source: str  # a folder of class tars
    shard_rows: int


def measure(case: PrepareCase) -> dict[str, Any]:
    """Figures of one case."""
    config = DatasetConfig(
        root=case.source, short_side=SHORT_SIDE, shard_rows=case.shard_rows, max_rejected=0.1
    )
    with ExitStack() as stack:
        target = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        tasks: MapTasks = serially
        if case.workers > 1:
            pool = stack.enter_context(ProcessPoolExecutor(case.workers, get_context("forkserver")))
            tasks = Pooled(pool)
        for _ in tasks(_start, [0.5] * case.workers):
            pass
        begin = time.perf_counter()
        images = (_ours if case.preparer == "ours" else _pillow)(config, target, tasks)
        seconds = time.perf_counter() - begin
    rate = images / seconds
    figures = {"images": images, "images_per_s": rate, "images_per_s_per_core": rate / case.workers}
    return {"preparer": case.preparer, "workers": case.workers, **figures}


def _start(seconds: float) -> None:
    """Keep a process busy while the others start, with everything imported that the work needs (pyarrow's first array brings
    pandas along)."""
    pa.array([0])
    time.sleep(seconds)


def _ours(config: DatasetConfig, target: Path, tasks: MapTasks) -> int:
    figures = prepare_dataset(
        "bench", config, target / "dataset", 0, tasks, lambda *_: None, lambda *_: None
    )
    return int(figures["images"] + figures["validation"])


def _pillow(config: DatasetConfig, target: Path, tasks: MapTasks) -> int:
    tars = sorted(Path(config.root).rglob("*.tar"))
    return sum(images for _, images in tasks(partial(pillow_tar, config, target), tars))


def pillow_tar(config: DatasetConfig, target: Path, tar: Path) -> int:
    """The images of one tar, each into a file named by its hash; returns how many."""
    folder, images = target / tar.stem, 0
    folder.mkdir(exist_ok=True)
    with tarfile.open(tar) as archive:
        for member in archive:
            file = archive.extractfile(member)
            if file is not None:
                data = pillow_image(file.read(), SHORT_SIDE, config.jpeg_quality)
                (folder / f"{xxhash.xxh3_128_hexdigest(data)}.jpg").write_bytes(data)
                images += 1
    return images


def pillow_image(data: bytes, short_side: int, quality: int) -> bytes:
    """One image decoded, checked and made as small as ours, encoded with the same quality and colour resolution.

    Scaled by Pillow's default filter, bicubic: of its filters the one whose images are nearest to ours (by area).
    """
    with Pillow.open(io.BytesIO(data)) as opened:
        image = opened.convert("RGB")  # decodes all of it, or raises
    if min(image.size) <= short_side:
        return data
    scale = short_side / min(image.size)
    width, height = round(image.width * scale), round(image.height * scale)
    out = io.BytesIO()
    image.resize((width, height)).save(out, "JPEG", quality=quality, subsampling="4:4:4")
    return out.getvalue()


def ratios(cases: Sequence[dict[str, Any]]) -> dict[str, float]:
    """``per_core``: ours to Pillow's at one worker; ``scaling``: ours at two workers to one; from the best of all rounds."""
    rates = {
        key: max(c["images_per_s"] for c in cases if _key(c) == key)
        for key in {_key(c) for c in cases}
    }
    return {
        "per_core": rates["ours", 1] / rates["pillow", 1],
        "scaling": rates["ours", 2] / rates["ours", 1],
        "pillow_scaling": rates["pillow", 2] / rates["pillow", 1],
    }


def _key(case: dict[str, Any]) -> tuple[str, int]:
    return case["preparer"], case["workers"]


def table(cases: Sequence[dict[str, Any]]) -> str:
    lines = ["preparer  workers  images  images/s  a core  peak MiB"]
    lines += [
        f"{c['preparer']:<9} {c['workers']:>7} {c['images']:>7} {c['images_per_s']:>9.1f} "
        f"{c['images_per_s_per_core']:>7.1f} {c['peak_mb']:>9.0f}"
        for c in cases
    ]
    return "\n".join([*lines, *(f"{name}: {ratio:.2f}" for name, ratio in ratios(cases).items())])


def main(
    json_path: Path | None = None, images: int = 500, copies: int = 6, rounds: int = 2
) -> dict[str, Any]:
    """Measure both with 1 and 2 workers, some rounds in turn, print a table, write JSON."""
    cases = []
    with tempfile.TemporaryDirectory() as temporary:
        found = photographs(images)
        names = sorted({image.wnid for image in found})[:TARS]
        source = [replace(image, wnid=names[i % len(names)]) for i, image in enumerate(found)]
        write_class_tars(source, Path(temporary), copies)
        for number in range(rounds):
            for workers in (1, 2):
                for preparer in ("ours", "pillow"):
                    case = PrepareCase(
                        preparer, workers, temporary, shard_rows=max(1, len(source) * copies // 8)
                    )
                    cases.append(
                        {**run_case("pipeline.bench.prepare", asdict(case)), "round": number}
                    )
                    rate = f"{cases[-1]['images_per_s']:.1f} images/s"
                    print(f"{preparer} {workers}: {rate}", file=sys.stderr, flush=True)
    result = {"cases": cases, "ratios": ratios(cases)}
    print(table(cases))
    if json_path is not None:
        write_json(json_path, result)
    return result


if __name__ == "__main__":
    print(json.dumps(measure(PrepareCase(**json.loads(sys.argv[1])))))
