"""Preparation under kill -9 at twenty random moments: whatever dies, the rerun's files are those of an undisturbed run (D6)."""

from __future__ import annotations

import contextlib
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
from tests.e2e.job_runs import finish, record, run, start, state
from tests.prepare.source_folders import Files, write_tar

pytestmark = pytest.mark.slow

VICTIMS = {
    "driver": "",
    "worker": "ray::_apply",
    "raylet": "raylet/raylet",
}  # patterns of command lines
ORDER = ["driver"] * 6 + ["worker"] * 8 + ["raylet"] * 6
JOB = """
name: small
model: {{channels: [8, 16, 24, 32], depths: [1, 1, 2, 1], columns: 4}}
data: {{root: {root}, min_side: 16, shard_rows: 40, max_rejected: 0.1}}
stages: {{prepare: {{}}}}
"""


def files(label: int, split: str, count: int) -> Files:
    """Small pictures in large files (what follows a JPEG's end is kept), so that there is work to be cut and not much to do;
    among them damaged ones and duplicates."""
    random_bytes = np.random.default_rng([label, len(split)]).bytes
    found = {
        f"{split}{i}.JPEG": jpeg(100 * label + i, 40, 32) + random_bytes(200_000)
        for i in range(count)
    }
    if split == "train" and label % 4 == 0:
        found |= {
            "cut.JPEG": found["train0.JPEG"][:400],
            "again.JPEG": found["train1.JPEG"],
            "page.JPEG": b"<html>",
        }
    return found


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    """Of sources and runs; also TMPDIR: Ray wants a short name."""
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
    """Of every file of every dataset that the stage has left."""
    made = job.parent / "runs/small/stages/prepare"
    found = [path for path in sorted(made.rglob("*")) if path.is_file() and path.name != "job.json"]
    return {str(path.relative_to(made)): file_digest(path) for path in found}


def processes(session: int, pattern: str) -> list[int]:
    found = subprocess.run(
        ["pgrep", "-s", str(session), "-f", pattern], capture_output=True, text=True, check=False
    )
    return [int(pid) for pid in found.stdout.split()]


def at_work(process: subprocess.Popen[str]) -> bool:
    """Wait until a piece of work is under way; False where the run has ended before."""
    while process.poll() is None:
        if processes(process.pid, VICTIMS["worker"]):
            return True
        time.sleep(0.1)
    return False


def kill(victim: str, process: subprocess.Popen[str], choices: random.Random) -> bool:
    """Whether there was one to kill, in a preparation that was under way."""
    found = [process.pid] if victim == "driver" else processes(process.pid, VICTIMS[victim])
    if not found or process.poll() is not None:
        return False
    with contextlib.suppress(ProcessLookupError):
        os.kill(choices.choice(found), signal.SIGKILL)
        return True
    return False


def phase(job: Path) -> str:
    work = job.parent / "runs/small/stages/prepare/images/work"
    return (
        "mixing" if list(work.glob("train-*.json")) or (work / "fates.npy").exists() else "reading"
    )


def ended(process: subprocess.Popen[str], victim: str) -> int:
    """The exit code. Of a killed driver the orphans are not waited for: the next run begins while they die."""
    if victim == "driver":
        assert process.stdout is not None
        process.wait()
        process.stdout.close()
        return process.returncode
    code, out = finish(process)
    assert code in (0, 3), out
    assert code == 0 or "rerun the same command to resume" in out, out
    return code


def test_killed_at_twenty_random_moments(
    images: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each kill hits a run that goes on from where the last one was cut; one that comes to its end is compared, and the next
    begins in a new folder."""
    monkeypatch.setenv("TMPDIR", str(folder))
    monkeypatch.setenv(
        "RAY_health_check_initial_delay_ms", "500"
    )  # of 5000: a lost raylet is known for lost the sooner
    monkeypatch.setenv("RAY_health_check_period_ms", "500")  # of 3000
    seed = int(os.environ.get("KILL_SEED", time.time_ns() % 2**32))
    print(f"KILL_SEED={seed}")
    choices = random.Random(seed)
    order = choices.sample(ORDER, len(ORDER))
    job = make_job(folder / "undisturbed", images)
    run(job)
    wanted, seconds = digests(job), record(job)["stages"]["prepare"]["seconds"]
    shutil.rmtree(job.parent)
    killed: list[tuple[str, str]] = []
    job = make_job(folder / "0", images)
    processes_begun, finished = [start(job)], 0
    while True:
        process, victim = processes_begun[-1], ""
        if len(killed) < len(order) and at_work(process):
            time.sleep(choices.uniform(0, 0.6 * seconds))
            moment = phase(job)
            if kill(order[len(killed)], process, choices):
                victim = order[len(killed)]
                killed.append((victim, moment))
                print(f"{victim} killed while {moment}")
                if victim == "worker":
                    continue  # the run goes on by itself
        if ended(process, victim) == 0:
            assert digests(job) == wanted, killed
            assert (
                state(job, "prepare") == "done"
                and not (job.parent / "runs/small/replaced").exists()
            )
            shutil.rmtree(job.parent)
            finished += 1
            if len(killed) == len(order):
                break
            job = make_job(folder / str(finished), images)
        processes_begun.append(start(job))
    print(
        f"{len(killed)} kills, {len(processes_begun)} runs, {finished} datasets: {dict(Counter(killed))}"
    )
    assert all(gone(process) for process in processes_begun), "a process lives on"


def gone(process: subprocess.Popen[str]) -> bool:
    """Whether all of a run's processes end in a while; Ray's agents, which do nothing by themselves, take their time."""
    for _ in range(300):
        if not processes(process.pid, "pipeline|ray::_apply|raylet/raylet|gcs_server"):
            return True
        time.sleep(0.1)
    return False


def test_rays_folders_of_killed_runs_are_removed(monkeypatch: pytest.MonkeyPatch) -> None:
    with tempfile.TemporaryDirectory(prefix="kill-") as name:
        monkeypatch.setattr(tempfile, "tempdir", name)
        left = {one: Path(name) / f"revcol-ray-{one}" for one in ("dead", "living", "new", "torn")}
        for folder in left.values():
            (folder / "session_1" / "logs").mkdir(parents=True)
            (folder / "session_latest").symlink_to(folder / "session_1")
        for one in ("dead", "living"):
            (left[one] / "lock").touch()
        os.utime(left["torn"], (0, 0))  # its lock went, then a dying process wrote again
        with open(left["living"] / "lock") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            with _private_directory() as own:
                assert {own, left["living"], left["new"]} == set(Path(name).iterdir())
