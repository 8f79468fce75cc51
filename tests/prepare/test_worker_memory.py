"""What one worker of the preparation takes: the same for ten photographs as for ten thousand."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest

from tests.prepare.sources import write_tar

BOUND = 250  # MiB beyond what is imported: a unit's compressed bytes, a group of rows, and images on their way
WORK = """
import sys, threading, time
from pathlib import Path
from tests.prepare.sources import prepare

def own():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("RssAnon")) // 1024

prepare(sys.argv[1], Path(sys.argv[3]) / "small")
before, peak, over = own(), 0, threading.Event()

def watch():
    global peak
    while not over.wait(0.003):
        peak = max(peak, own())

watcher = threading.Thread(target=watch)
watcher.start()
figures = prepare(sys.argv[2], Path(sys.argv[3]) / "large")
over.set()
watcher.join()
print(int(figures["images"] + figures["validation"]), peak - before)
"""


def photographs(number: int, seed: int) -> dict[str, bytes]:
    """Different JPEGs of about 120 kB."""
    random = np.random.default_rng(seed)
    made = {}
    for i in range(number):
        noise = random.integers(0, 256, (60, 80, 3), dtype=np.uint8)
        image = cv2.resize(noise, (640, 480), interpolation=cv2.INTER_CUBIC)
        made[f"{i:05d}.JPEG"] = bytes(cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, 96])[1])
    return made


@pytest.mark.slow
def test_a_workers_memory_does_not_grow_with_the_source(tmp_path: Path) -> None:
    for name, count in (("small", 10), ("large", 2000)):
        for seed, (split, number) in enumerate((("train/c0", count), ("train/c1", 10), ("val/c0", 9), ("val/c1", 9))):
            write_tar(tmp_path / name / f"{split}.tar", photographs(number, seed))
    size = (tmp_path / "large" / "train" / "c0.tar").stat().st_size >> 20
    command = [sys.executable, "-c", WORK, str(tmp_path / "small"), str(tmp_path / "large"), str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    images, peak = map(int, done.stdout.split())
    assert images == 2028 and size > BOUND and peak < BOUND, (size, peak)
    print(f"{size} MiB of photographs, {peak} MiB at the peak")
