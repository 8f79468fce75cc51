"""A log that cannot be written costs its lines, and no training."""

from __future__ import annotations

import errno
import io
import os
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from pipeline.config.schema import Job
from pipeline.layout import RunDir
from pipeline.monitor import events
from pipeline.monitor.console import Display
from pipeline.monitor.events import EventWriter, read_events
from tests.train import processes, staging

FULL = Path("/dev/full")  # every write fails, as on a full disk
pytestmark = pytest.mark.skipif(not FULL.exists(), reason="this system has no /dev/full")


class FailingFile(io.FileIO):
    """A file on a disk that takes nothing any more."""

    def write(self, data: Any) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))


def train(fails: bool, job: Job, run_dir: RunDir) -> dict[str, float]:
    def open_log(path: Path, mode: str) -> io.IOBase:
        if mode == "ab":
            return io.BufferedWriter(FailingFile(path, mode))
        return open(path, mode)  # type: ignore[return-value]

    if fails:
        events.open = open_log  # type: ignore[attr-defined]
    return staging.train(job, "pretrain", run_dir)


def test_a_training_without_its_logs_gives_the_same_weights(tmp_path: Path) -> None:
    job = staging.job(pretrain={"max_steps": 4})
    weights = []
    for fails in (False, True):
        run_dir = staging.prepared_run(tmp_path / str(fails))
        arguments = (fails, job, run_dir)
        results = processes.run(run_dir.logs / "output", 2, train, *arguments)
        assert all(isinstance(metrics, dict) for metrics in results), results
        weights.append(run_dir.weights("pretrain").read_bytes())
        assert bool(read_events(run_dir.events("pretrain"))) != fails
    assert weights[0] == weights[1]


def test_the_first_lost_event_is_reported_and_later_ones_are_written_again(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "events.jsonl"
    writer = EventWriter(path)
    writer.write("step", 1)
    good = os.dup(writer._file.fileno())
    with open(FULL, "wb") as full:
        os.dup2(full.fileno(), writer._file.fileno())
    writer.write("step", 2)
    writer.write("message", 2, text="lost")
    os.dup2(good, writer._file.fileno())
    writer.write("step", 3)
    writer.close()
    assert capfd.readouterr().err.count("events.jsonl cannot be written: ") == 1
    steps = [event.step for event in read_events(path)]
    assert (steps[0], steps[-1]) == (1, 3)


def test_the_display_continues_until_its_log_can_be_written(tmp_path: Path) -> None:
    console = Console(record=True, width=200)
    with open(tmp_path / "run.log", "w") as log_file:
        good = os.dup(log_file.fileno())
        with open(FULL, "wb") as full:
            os.dup2(full.fileno(), log_file.fileno())
        display = Display(console, log_file)
        display.log("one line")
        display.log("another line")
        lines = console.export_text().splitlines()
        assert [line for line in lines if line.startswith("warning")] == [
            "warning: the log of the run cannot be written: [Errno 28] No space left on device"
        ]
        assert lines[-1] == "another line"
        os.dup2(good, log_file.fileno())
        display.log("a third line")
    assert "a third line" in (tmp_path / "run.log").read_text()
