"""Preparation under kill -9 of the driver, a Ray worker or the raylet: the rerun's files are those of an undisturbed run."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.e2e.running import finish, run, start, state, wait_for
from tests.prepare.sources import class_tars, shard_bytes

pytestmark = pytest.mark.slow

JOB = """
name: small
model: {{channels: [8, 16, 24, 32], depths: [1, 1, 2, 1], columns: 4}}
data: {{root: {root}, min_side: 16, shard_rows: 50}}
stages: {{prepare: {{}}}}
"""
PATTERNS = {"driver": "", "worker": "ray::", "raylet": "raylet/raylet"}


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return class_tars(tmp_path_factory.mktemp("source") / "images", classes=40, count=60, validation=5)


def make_job(folder: Path, images: Path) -> Path:
    job = folder / "small.yaml"
    job.write_text(JOB.format(root=images))
    return job


@pytest.fixture(scope="module")
def undisturbed(images: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    job = make_job(tmp_path_factory.mktemp("undisturbed"), images)
    run(job)
    return shard_bytes(job.parent / "runs/small/stages/prepare/images")


def kill(victim: str, driver: subprocess.Popen[str]) -> None:
    if victim == "driver":
        driver.kill()
        return
    found = subprocess.run(
        ["pgrep", "-s", str(driver.pid), "-f", PATTERNS[victim]], capture_output=True, text=True, check=False
    )
    for pid in [int(pid) for pid in found.stdout.split()][:1]:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


@pytest.mark.parametrize("victim", PATTERNS)
def test_killed_preparation_ends_with_the_same_bytes(
    victim: str, images: Path, undisturbed: dict[str, bytes], tmp_path: Path
) -> None:
    job, choices = make_job(tmp_path, images), random.Random(victim)
    for _ in range(2):
        process = start(job)
        wait_for(lambda: state(job, "prepare") in ("running", "done"), process)
        time.sleep(choices.random())
        kill(victim, process)
        finish(process)
    run(job)
    target = tmp_path / "runs/small/stages/prepare/images"
    assert shard_bytes(target) == undisturbed
    assert state(job, "prepare") == "done"
