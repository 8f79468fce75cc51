"""Must show of the whole way: a job runs, does nothing the second time, and survives every interruption."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
from pathlib import Path

import pytest

from tests.e2e.job_runs import (
    finish,
    losses,
    make_job,
    metrics,
    record,
    results,
    run,
    start,
    state,
    wait_for,
)

pytestmark = pytest.mark.slow
STAGES = ["prepare", "pretrain", "finetune", "evaluate", "export"]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The job file of a run that was left alone."""
    job = make_job(tmp_path_factory.mktemp("undisturbed"))
    out = run(job)
    assert "evaluate: done" in out
    return job


def test_every_stage_is_done_and_a_second_call_does_nothing(undisturbed: Path) -> None:
    run_dir = undisturbed.parent / "runs" / "small"
    assert [record(undisturbed)["stages"][stage]["state"] for stage in STAGES] == ["done"] * 5
    assert record(undisturbed)["stages"]["evaluate"]["metrics"]["images"] == 33
    assert record(undisturbed)["stages"]["export"]["metrics"]["reload_difference"] == 0
    assert sorted(losses(run_dir, "pretrain")) == list(range(1, 29))
    before = {path: path.stat().st_mtime_ns for path in run_dir.rglob("*") if path.is_file()}
    out = run(undisturbed)
    assert "nothing to do: every stage is done and nothing has changed" in out
    touched = [path.name for path, time in before.items() if path.stat().st_mtime_ns != time]
    assert sorted(touched) == [".lock", "run.json", "run.log", "run.yaml"]


def test_killed_in_every_stage_it_ends_with_the_same_files(
    undisturbed: Path, tmp_path: Path
) -> None:
    job, choices = make_job(tmp_path), random.Random(7)
    for stage in STAGES:
        process = start(job)
        waits = {"prepare": 0.3, "pretrain": 8.0, "finetune": 8.0, "evaluate": 5.0, "export": 3.0}[
            stage
        ] * choices.random()
        assert wait_for(lambda stage=stage: state(job, stage) == "running", process), finish(
            process
        )  # type: ignore[misc]
        wait_for(lambda stage=stage: state(job, stage) != "running", process, waits)  # type: ignore[misc]
        process.kill()  # the driver alone: its workers have to notice
        process.communicate()
    run(job)
    disturbed, reference = tmp_path / "runs" / "small", undisturbed.parent / "runs" / "small"
    assert results(disturbed) == results(reference)
    assert metrics(disturbed) == metrics(reference)
    for stage in ("pretrain", "finetune"):
        assert losses(disturbed, stage) == losses(reference, stage)


def test_a_killed_rank_is_replaced_without_a_trace_in_the_result(
    undisturbed: Path, tmp_path: Path
) -> None:
    job = make_job(tmp_path)
    process = start(job, "--stage", "prepare", "--stage", "pretrain")
    run_dir = tmp_path / "runs" / "small"
    assert wait_for(
        lambda: len(list((run_dir / "checkpoints").glob("pretrain/step-*"))) > 0, process
    ), finish(process)
    ranks = subprocess.run(
        ["pgrep", "-s", str(process.pid), "-f", "ray::Worker"],
        capture_output=True,
        text=True,
        check=False,
    )
    workers = [int(pid) for pid in ranks.stdout.split()]
    assert len(workers) == 2
    os.kill(workers[1], signal.SIGKILL)
    code, out = finish(process)
    assert code == 0, out
    assert "starting the processes again from the last checkpoint" in out
    reference = undisturbed.parent / "runs" / "small"
    assert losses(run_dir, "pretrain") == losses(reference, "pretrain")
    weights = Path("stages/pretrain/weights.safetensors")
    assert (run_dir / weights).read_bytes() == (reference / weights).read_bytes()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stop_on_request_is_resumable(
    undisturbed: Path, tmp_path: Path, number: signal.Signals
) -> None:
    job = tmp_path / "small.yaml"
    shutil.copy(undisturbed, job)
    shutil.copytree(
        undisturbed.parent / "runs" / "small" / "stages" / "prepare",
        tmp_path / "runs/small/stages/prepare",
    )
    run_dir = tmp_path / "runs" / "small"
    process = start(job, "--stage", "prepare", "--stage", "pretrain")
    assert wait_for(
        lambda: (
            (run_dir / "logs/pretrain.jsonl").exists() and len(losses(run_dir, "pretrain")) >= 2
        ),
        process,
    )
    process.send_signal(number)
    code, out = finish(process)
    assert code == 75, out
    assert "the same command goes on from there" in out
    assert state(job, "pretrain") == "pending"
    out = run(job, "--stage", "pretrain")
    assert "pretrain: was interrupted, goes on" in out
    assert losses(run_dir, "pretrain") == losses(undisturbed.parent / "runs" / "small", "pretrain")
