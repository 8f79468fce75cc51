"""Preparation killed at random moments (D6): reruns give the bytes of an uninterrupted run."""

from __future__ import annotations

import fcntl
import os
import random
import shutil
import signal
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from pipeline.files import file_digest
from pipeline.orchestrate.ray_session import _private_directory
from tests.data.small_datasets import jpeg
from tests.e2e.job_runs import finish, processes, record, run, start, state
from tests.prepare.source_folders import Files, write_tar

pytestmark = pytest.mark.slow

# Patterns of the victims' command lines. The driver is the process that the test starts.
VICTIMS = {"driver": "", "worker": "ray::_apply", "raylet": "raylet/raylet"}
KILLS = ["driver"] * 6 + ["worker"] * 8 + ["raylet"] * 6
JOB = """
name: small
model: {{channels: [8, 16, 24, 32], depths: [1, 1, 2, 1], columns: 4}}
data: {{root: {root}, min_side: 16, shard_rows: 40, max_rejected: 0.1}}
stages: {{prepare: {{}}}}
"""


def files(label: int, split: str, count: int) -> Files:
    """Small images in large files, among them damaged ones and duplicates.

    Bytes after the end of a JPEG are kept but not decoded: units take long to read and write,
    which leaves time for a kill, and need little computation.
    """
    random_bytes = np.random.default_rng([label, len(split)]).bytes
    contents = {
        f"{split}{i}.JPEG": jpeg(100 * label + i, 40, 32) + random_bytes(200_000)
        for i in range(count)
    }
    if split == "train" and label % 4 == 0:
        contents |= {
            "cut.JPEG": contents["train0.JPEG"][:400],
            "again.JPEG": contents["train1.JPEG"],
            "page.JPEG": b"<html>",
        }
    return contents


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    """The folder of sources and runs, also TMPDIR. Ray needs a short path."""
    with tempfile.TemporaryDirectory(prefix="kill-") as name:
        yield Path(name)


@pytest.fixture(scope="module")
def images(folder: Path) -> Path:
    for label in range(24):
        write_tar(folder / "images" / "train" / f"c{label}.tar", files(label, "train", 20))
        write_tar(folder / "images" / "val" / f"c{label}.tar", files(label, "val", 4))
    return folder / "images"


def make_job(folder: Path, images: Path) -> Path:
    folder.mkdir()
    (folder / "small.yaml").write_text(JOB.format(root=images))
    return folder / "small.yaml"


def digests(job: Path) -> dict[str, str]:
    """Digest of every file of every dataset that the stage has written."""
    datasets = job.parent / "runs/small/stages/prepare"
    paths = [path for path in sorted(datasets.rglob("*")) if path.is_file()]
    return {
        str(path.relative_to(datasets)): file_digest(path)
        for path in paths
        if path.name != "job.json"
    }


def wait_for_worker(process: subprocess.Popen[str]) -> bool:
    """Wait until a task is running; False if the run ends before."""
    while process.poll() is None:
        if processes(process, VICTIMS["worker"]):
            return True
        time.sleep(0.1)
    return False


def kill(victim: str, process: subprocess.Popen[str], choices: random.Random) -> bool:
    """Kill a process of a running preparation; False if there is none to kill."""
    candidates = [process.pid] if victim == "driver" else processes(process, VICTIMS[victim])
    if not candidates or process.poll() is not None:
        return False
    try:
        os.kill(choices.choice(candidates), signal.SIGKILL)
    except ProcessLookupError:
        return False
    return True


def phase(job: Path) -> str:
    work = job.parent / "runs/small/stages/prepare/images/work"
    is_planned = (work / "drop_reasons.npy").exists() or list(work.glob("train-*.json"))
    return "shuffling" if is_planned else "reading"


def wait_for_end(process: subprocess.Popen[str], victim: str) -> int:
    """The exit code.

    The orphans of a killed driver are not awaited: the next run starts meanwhile.
    """
    if victim == "driver":
        assert process.stdout is not None
        process.wait()
        process.stdout.close()
        return process.returncode
    code, out = finish(process)
    assert code in (0, 3), out
    if code != 0:
        assert "rerun the same command to resume" in out, out
    return code


def all_gone(process: subprocess.Popen[str]) -> bool:
    """Whether all processes of a run end within 30 seconds."""
    for _ in range(300):
        if not processes(process, "pipeline|ray"):
            return True
        time.sleep(0.1)
    return False


def uninterrupted(folder: Path, images: Path) -> tuple[dict[str, str], float]:
    """(digests, seconds) of a run that nothing disturbs."""
    job = make_job(folder / "uninterrupted", images)
    run(job)
    expected = digests(job)
    seconds = float(record(job)["stages"]["prepare"]["seconds"])
    shutil.rmtree(job.parent)
    return expected, seconds


def test_a_preparation_killed_twenty_times_gives_the_same_bytes(
    images: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each kill hits a run that resumes where the last one was cut off.

    A run that completes is compared with the uninterrupted one; the next starts in a new folder.
    """
    monkeypatch.setenv("TMPDIR", str(folder))
    # Ray notices a lost raylet after 0.5 s instead of 5 s.
    monkeypatch.setenv("RAY_health_check_initial_delay_ms", "500")
    monkeypatch.setenv("RAY_health_check_period_ms", "500")
    seed = int(os.environ.get("KILL_SEED", time.time_ns() % 2**32))
    print(f"KILL_SEED={seed}")
    choices = random.Random(seed)
    victims = choices.sample(KILLS, len(KILLS))
    expected, seconds = uninterrupted(folder, images)
    killed: list[tuple[str, str]] = []
    job = make_job(folder / "0", images)
    runs = [start(job)]
    completed = 0
    while True:
        process = runs[-1]
        victim = ""
        if len(killed) < len(victims) and wait_for_worker(process):
            time.sleep(choices.uniform(0, 0.6 * seconds))
            moment = phase(job)
            if kill(victims[len(killed)], process, choices):
                victim = victims[len(killed)]
                killed.append((victim, moment))
                print(f"{victim} killed while {moment}")
                if victim == "worker":
                    continue  # the run retries the task by itself
        if wait_for_end(process, victim) == 0:
            assert digests(job) == expected, killed
            assert state(job, "prepare") == "done"
            assert not (job.parent / "runs/small/replaced").exists()
            shutil.rmtree(job.parent)
            completed += 1
            if len(killed) == len(victims):
                break
            job = make_job(folder / str(completed), images)
        runs.append(start(job))
    print(f"{len(killed)} kills, {len(runs)} runs, {completed} datasets: {dict(Counter(killed))}")
    assert all(all_gone(process) for process in runs), "a process is still running"


def test_folders_of_killed_ray_sessions_are_removed(monkeypatch: pytest.MonkeyPatch) -> None:
    with tempfile.TemporaryDirectory(prefix="kill-") as name:
        monkeypatch.setattr(tempfile, "tempdir", name)
        states = ("dead", "living", "new", "torn")
        folders = {state: Path(name) / f"revcol-ray-{state}" for state in states}
        for folder in folders.values():
            (folder / "session_1" / "logs").mkdir(parents=True)
            (folder / "session_latest").symlink_to(folder / "session_1")
        for with_lock in ("dead", "living"):
            (folders[with_lock] / "lock").touch()
        # "torn": the lock was removed, then a dying process wrote into the folder again.
        os.utime(folders["torn"], (0, 0))
        with open(folders["living"] / "lock") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            with _private_directory() as own:
                assert {own, folders["living"], folders["new"]} == set(Path(name).iterdir())
