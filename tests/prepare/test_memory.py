"""Preparation needs little memory: for any number of images, and for huge ones."""

from __future__ import annotations

import gzip
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import simplejpeg

from pipeline.config.schema import DatasetConfig
from pipeline.prepare.clean import clean
from pipeline.sources.member import Rejection
from tests.prepare.bombs import jpeg_bomb, png_bomb
from tests.prepare.source_folders import class_tars, images, write_tar

ROOT = Path(__file__).resolve().parents[2]
HUGE = 30_000  # side in pixels
HUGE_BOUND = 64  # MiB that a huge image may add to the peak; decoded, it would be 2,575
BOUND = 250  # MiB beyond the imports: bytes of a unit, a group of rows, images in flight
WORK = """
import sys, threading, time
from pathlib import Path
from tests.prepare.source_folders import prepare

def own():
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) // 1024

prepare(sys.argv[1], Path(sys.argv[3]) / "small")
before = own()
peak = 0
over = threading.Event()

def watch():
    global peak
    while not over.wait(0.003):
        peak = max(peak, own())

watcher = threading.Thread(target=watch)
watcher.start()
metrics = prepare(sys.argv[2], Path(sys.argv[3]) / "large")
over.set()
watcher.join()
print(int(metrics["images"] + metrics["validation"]), peak - before)
"""


def printed(code: str, *paths: Path) -> list[str]:
    """The words that the code prints, run in a process of its own so that its memory is its own."""
    process = subprocess.run(
        [sys.executable, "-c", code, *map(str, paths)],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == 0, process.stderr
    return process.stdout.split()


def photographs(number: int, seed: int) -> dict[str, bytes]:
    """Different JPEGs of about 120 kB."""
    random = np.random.default_rng(seed)
    files = {}
    for i in range(number):
        noise = random.integers(0, 256, (60, 80, 3), dtype=np.uint8)
        image = cv2.resize(noise, (640, 480), interpolation=cv2.INTER_CUBIC)
        files[f"{i:05d}.JPEG"] = bytes(
            cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, 96])[1]
        )
    return files


@pytest.mark.slow
def test_the_memory_of_a_worker_does_not_grow_with_the_source(tmp_path: Path) -> None:
    for name, count in (("small", 10), ("large", 2000)):
        for seed, (split, number) in enumerate(
            (("train/c0", count), ("train/c1", 10), ("val/c0", 9), ("val/c1", 9))
        ):
            write_tar(tmp_path / name / f"{split}.tar", photographs(number, seed))
    size = (tmp_path / "large" / "train" / "c0.tar").stat().st_size >> 20
    images, peak = map(int, printed(WORK, tmp_path / "small", tmp_path / "large", tmp_path / "out"))
    assert images == 2028
    assert size > BOUND, f"{size} MiB of photographs prove nothing"
    assert peak < BOUND, f"{peak} MiB at the peak"
    print(f"{size} MiB of photographs, {peak} MiB at the peak")


def test_bombs_are_valid_images() -> None:
    """Otherwise the next test would prove nothing."""
    shown = simplejpeg.decode_jpeg(jpeg_bomb(96), strict=True)
    assert shown.shape == (96, 96, 3)
    assert (shown == 128).all()
    cleaned = clean(png_bomb(96), "a.png", DatasetConfig(root="x"))
    assert not isinstance(cleaned, Rejection)
    assert (cleaned.width, cleaned.height, cleaned.changed) == (96, 96, "converted")


PEAK = """
import sys
from pathlib import Path
from tests.prepare.source_folders import prepare

def status(name):
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name)) // 1024

prepare(sys.argv[1], Path(sys.argv[3]) / "plain")
Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from here
before = status("VmRSS")
metrics = prepare(sys.argv[2], Path(sys.argv[3]) / "bombs")
print(metrics["rejected"], status("VmHWM") - before)
"""


@pytest.mark.parametrize("kind", ["jpeg", "png", "gzipped jpeg"])
def test_a_huge_image_costs_a_bounded_amount_of_memory(kind: str, tmp_path: Path) -> None:
    """30,000 x 30,000 pixels: rejected by the header, never decoded."""
    bomb = png_bomb(HUGE) if kind == "png" else jpeg_bomb(HUGE)
    plain = class_tars(tmp_path / "plain", classes=2, count=4, validation=2)
    shutil.copytree(plain, tmp_path / "bombs")
    data = gzip.compress(bomb, 1) if kind.startswith("gzip") else bomb
    write_tar(tmp_path / "bombs" / "train" / "c0.tar", {**images(0, 4), "huge.JPEG": data})
    rejected, grown = printed(PEAK, plain, tmp_path / "bombs", tmp_path / "out")
    description = json.loads((tmp_path / "out" / "bombs" / "dataset.json").read_text())
    assert float(rejected) == 1
    assert description["rejected"] == {"too_many_pixels": 1}
    assert int(grown) < HUGE_BOUND, f"the peak grew by {grown} MiB"
