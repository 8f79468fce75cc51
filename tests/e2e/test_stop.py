"""Stop requests to a real driver whose stage ignores them: exit codes 75 and 130 within seconds."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.e2e.job_runs import ROOT, finish, wait_for

# Replaces the function of every stage by one that never ends and never looks at the stop flag.
DRIVER = """
import os, pathlib, sys, time
from pipeline.cli import main
from pipeline.orchestrate import artifacts, job_runner

folder = pathlib.Path.cwd()

def sleeping(dist_env, stop):
    (folder / f"pid{dist_env.rank}").write_text(str(os.getpid()))
    time.sleep(600)

job_runner.stage_fn = lambda job, stage, run_dir: sleeping
artifacts.inputs = lambda job, stage, run_dir: {}  # as if the stages before were done
main()
"""
JOB = """
name: small
model: {channels: [8, 16, 24, 32], depths: [1, 1, 2, 1], columns: 4}
cluster: {processes: 2, device: cpu, threads: 1}
data: {set: {synthetic: {classes: 3, images_per_class: 40}}}
stages:
  prepare: {}
  pretrain: {epochs: 1, image_size: 32, global_batch: 8, base_lr: 1e-3}
  evaluate: {from: pretrain}
"""


def start(folder: Path, stage: str) -> subprocess.Popen[str]:
    """A driver with this stage running in two processes."""
    (folder / "small.yaml").write_text(JOB)
    process = subprocess.Popen(
        [sys.executable, "-c", DRIVER, "small.yaml", "--stage", stage],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    files = [folder / f"pid{rank}" for rank in range(2)]
    if not wait_for(lambda: all(file.exists() and file.read_text() for file in files), process, 90):
        pytest.fail(finish(process)[1])
    return process


def assert_no_rank_is_left(folder: Path) -> None:
    pids = [int((folder / f"pid{rank}").read_text()) for rank in range(2)]
    deadline = time.monotonic() + 5
    while any(Path(f"/proc/{pid}").exists() for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)


def state(folder: Path, stage: str) -> str:
    record = json.loads((folder / "runs/small/run.json").read_text())
    return str(record["stages"][stage]["state"])


def test_sigterm_during_evaluate_ends_within_seconds_with_75(tmp_path: Path) -> None:
    process = start(tmp_path, "evaluate")
    sent = time.monotonic()
    process.send_signal(signal.SIGTERM)
    code, out = finish(process, 60)
    assert code == 75, out
    assert time.monotonic() - sent < 15  # of which Ray's own shutdown takes 2
    assert "warning: stopping\n" in out
    assert "rerun the same command to resume" in out
    assert state(tmp_path, "evaluate") == "pending"
    assert_no_rank_is_left(tmp_path)


def test_a_second_ctrl_c_during_training_ends_at_once_with_130(tmp_path: Path) -> None:
    process = start(tmp_path, "pretrain")
    process.send_signal(signal.SIGINT)
    log = tmp_path / "runs/small/logs/run.log"
    announced = "stopping after the current step (Ctrl-C again stops at once)"
    assert wait_for(lambda: announced in log.read_text(), process, 10), finish(process)
    sent = time.monotonic()
    process.send_signal(signal.SIGINT)
    code, out = finish(process, 60)
    assert code == 130, out
    assert time.monotonic() - sent < 15
    assert "ended at once; rerun the same command to resume from the last checkpoint" in out
    assert "Traceback" not in out
    assert state(tmp_path, "pretrain") == "pending"
    assert_no_rank_is_left(tmp_path)
