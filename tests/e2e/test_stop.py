"""Signals to a real driver and kills of Ray's servers: the exit code, the state, nothing left.

The stages ignore stop requests and never end, so that a test can choose its moment.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.e2e.job_runs import ROOT, finish, processes, wait_for

# Replaces the function of every stage by one that never ends and never looks at the stop flag.
DRIVER = """
import os, pathlib, sys, time
from pipeline.cli import main
from pipeline.orchestrate import artifacts, job_runner

folder = pathlib.Path.cwd()

def sleeping(dist_env, link):
    (folder / f"pid{dist_env.rank}").write_text(str(os.getpid()))
    time.sleep(600)

def started(dist_env, link):
    (folder / "resumed").touch()
    raise KeyError("the stage has started")

is_second_call = (folder / "pid0").exists()
job_runner.stage_fn = lambda job, stage, run_dir: started if is_second_call else sleeping
artifacts.inputs = lambda job, stage, run_dir, expected=None: {}  # as if all before were done
artifacts.require_intact = lambda job, stage, run_dir, run_state, judged: None
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
  export: {from: pretrain}
"""


Driver = subprocess.Popen[str]


@pytest.fixture
def folder() -> Iterator[Path]:
    """The folder of the run, with TMPDIR inside. Ray needs a short path."""
    with tempfile.TemporaryDirectory(prefix="stop-") as name:
        (Path(name) / "t").mkdir()
        (Path(name) / "small.yaml").write_text(JOB)
        yield Path(name)


def launch(folder: Path, stage: str, *before: str) -> Driver:
    """Start a driver as the leader of a session. ``before``: a command that runs it."""
    return subprocess.Popen(
        [*before, sys.executable, "-c", DRIVER, "small.yaml", "--stage", stage],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT), "TMPDIR": str(folder / "t")},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def start(folder: Path, stage: str, *before: str) -> Driver:
    """A driver with this stage running: export in one process, any other stage in two."""
    process = launch(folder, stage, *before)
    ranks = 1 if stage == "export" else 2
    wait_until(lambda: ranks_run(folder, ranks), process)
    return process


def ranks_run(folder: Path, ranks: int) -> bool:
    files = [folder / f"pid{rank}" for rank in range(ranks)]
    return all(file.exists() and file.read_text() for file in files)


def wait_until(condition: Callable[[], bool], process: Driver) -> None:
    if not wait_for(condition, process, 90):
        process.kill()
        pytest.fail(finish(process)[1])
    processes(process, "")  # remembers Ray's session


def assert_nothing_is_left(process: Driver, folder: Path, seconds: float = 5) -> None:
    """No process of the run or of Ray, and so no port, and no temporary directory of Ray."""
    deadline = time.monotonic() + seconds
    left: list[object] = [process.pid]
    while left and time.monotonic() < deadline:
        time.sleep(0.05)
        left = [*processes(process, "pipeline|ray"), *(folder / "t").glob("revcol-ray-*")]
    assert left == []


def state(folder: Path, stage: str) -> str:
    record = json.loads((folder / "runs/small/run.json").read_text())
    return str(record["stages"][stage]["state"])


def handles(process: Driver, number: signal.Signals) -> bool:
    """True if the process has a handler for the signal."""
    status = Path(f"/proc/{process.pid}/status").read_text()
    caught = int(status.split("SigCgt:")[1].split()[0], 16)
    return bool(caught >> (number - 1) & 1)


def test_a_signal_before_the_command_line_is_imported_ends_with_75(folder: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-X", "importtime", "-m", "pipeline", "small.yaml"],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    assert wait_for(lambda: handles(process, signal.SIGTERM), process, 30)
    os.killpg(process.pid, signal.SIGTERM)
    code, out = finish(process, 60)
    assert code == 75, out[-2000:]
    assert "pipeline.cli.app" not in out  # it had not been imported
    assert out.endswith("stopped on request\n  -> rerun the same command to resume\n")
    assert not (folder / "runs").exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_while_ray_starts_ends_with_75(folder: Path, number: signal.Signals) -> None:
    process = launch(folder, "evaluate")
    wait_until(lambda: bool(list(folder.glob("t/revcol-ray-*/session_*"))), process)
    os.killpg(process.pid, number)
    code, out = finish(process, 60)
    assert code == 75, out
    assert "Traceback" not in out
    assert state(folder, "evaluate") == "pending"
    assert_nothing_is_left(process, folder)


CONNECT = """
import os, signal
from pipeline.orchestrate import ray_connection, ray_session

connect = ray_connection._Connection.run

def connect_and_signal(self):
    connect(self)
    os.kill(os.getpid(), signal.SIGTERM)

ray_connection._Connection.run = connect_and_signal
signal.signal(signal.SIGTERM, lambda number, frame: print("handled"))
with ray_session.ray_session(cpus=1, gpus=0):
    pass
print("end")
"""


def test_a_signal_while_the_driver_connects_with_ray_reaches_its_handler() -> None:
    result = subprocess.run(
        [sys.executable, "-c", CONNECT],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert result.stdout == "handled\nend\n", result.stderr
    assert "***" not in result.stderr  # the handler of Ray's C++ code


@pytest.mark.parametrize(
    ("stage", "number"),
    [("evaluate", signal.SIGTERM), ("export", signal.SIGUSR1), ("evaluate", signal.SIGHUP)],
)
def test_a_signal_to_the_group_during_a_stage_ends_within_seconds_with_75(
    folder: Path, stage: str, number: signal.Signals
) -> None:
    process = start(folder, stage)
    sent = time.monotonic()
    os.killpg(process.pid, number)
    code, out = finish(process, 100)
    assert code == 75, out
    assert time.monotonic() - sent < 30  # the wait for a lost Ray takes twice as long
    assert "warning: stopping\n" in out
    assert "rerun the same command to resume" in out
    assert "***" not in out  # Ray's own report of the signal
    assert state(folder, stage) == "pending"
    assert_nothing_is_left(process, folder)


def test_a_signal_to_every_process_stops_as_one_to_the_driver_does(folder: Path) -> None:
    """As systemd and some schedulers do: Ray must outlive it, or no checkpoint could be written."""
    process = start(folder, "pretrain")
    for pid in processes(process, ""):
        os.kill(pid, signal.SIGTERM)
    log = folder / "runs/small/logs/run.log"
    announced = "stopping after the current step"
    assert wait_for(lambda: announced in log.read_text(), process, 30), finish(process)
    time.sleep(5)  # longer than a raylet needs to end, and the driver to notice it
    assert process.poll() is None
    assert "error" not in log.read_text()
    assert_ranks_are_alive(folder)
    process.send_signal(signal.SIGQUIT)
    code, out = finish(process, 60)
    assert code == 130, out
    assert state(folder, "pretrain") == "pending"
    assert_nothing_is_left(process, folder)


def assert_ranks_are_alive(folder: Path) -> None:
    pids = [int((folder / f"pid{rank}").read_text()) for rank in range(2)]
    assert all(Path(f"/proc/{pid}").exists() for pid in pids)


def test_nohup_and_background_runs_keep_ignoring_the_terminal(folder: Path) -> None:
    process = start(folder, "pretrain", "env", "--ignore-signal=HUP,INT,QUIT")
    for number in (signal.SIGHUP, signal.SIGINT, signal.SIGQUIT):
        os.killpg(process.pid, number)
    time.sleep(2)
    assert process.poll() is None
    assert_ranks_are_alive(folder)
    assert "stopping" not in (folder / "runs/small/logs/run.log").read_text()
    process.kill()
    process.communicate()
    assert_nothing_is_left(process, folder, seconds=30)  # also after SIGKILL of the driver


@pytest.mark.parametrize("server", ["raylet", "gcs_server"])
def test_a_killed_server_of_ray_is_named_and_the_next_call_resumes(
    folder: Path, server: str
) -> None:
    process = start(folder, "pretrain")
    (pid,) = processes(process, f"/{server} ")
    os.kill(pid, signal.SIGKILL)
    code, out = finish(process, 100)
    assert code == 3, out
    assert f"({server}) was killed by SIGKILL\n  -> rerun the same command to resume" in out
    assert "(raylet)\x1b" not in out
    assert "Raylet is terminated" not in out  # Ray's own report
    assert "Traceback" not in out
    assert state(folder, "pretrain") == "failed"
    assert_nothing_is_left(process, folder)
    process = launch(folder, "pretrain")
    finish(process, 100)
    assert (folder / "resumed").exists()


def test_a_second_ctrl_c_during_training_ends_at_once_with_130(folder: Path) -> None:
    process = start(folder, "pretrain")
    os.killpg(process.pid, signal.SIGINT)
    log = folder / "runs/small/logs/run.log"
    announced = "stopping after the current step (Ctrl-C again stops at once)"
    assert wait_for(lambda: announced in log.read_text(), process, 10), finish(process)
    sent = time.monotonic()
    os.killpg(process.pid, signal.SIGINT)
    code, out = finish(process, 60)
    assert code == 130, out
    assert time.monotonic() - sent < 30
    assert "ended at once; rerun the same command to resume from the last checkpoint" in out
    assert "Traceback" not in out
    assert state(folder, "pretrain") == "pending"
    assert_nothing_is_left(process, folder)
