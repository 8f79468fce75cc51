"""A whole job: it runs, does nothing the second time, and survives every interruption."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.e2e.job_runs import (
    ROOT,
    finish,
    losses,
    make_job,
    metrics,
    processes,
    record,
    results,
    run,
    start,
    state,
    wait_for,
)

pytestmark = pytest.mark.slow
UMASK = 0o022
HANG_S = 30  # longer than the start of a process
STRICT_UMASK = 0o027  # of the runs that are killed
# Each stage, and the longest time (seconds) after its start at which its driver is killed.
KILLED_WITHIN = {"prepare": 0.3, "pretrain": 8.0, "finetune": 8.0, "evaluate": 5.0, "export": 3.0}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The job file of a run that was not interrupted."""
    job = make_job(tmp_path_factory.mktemp("undisturbed"))
    out = run(job, umask=UMASK)
    assert "evaluate: done" in out
    (job.parent / "output").write_text(out)
    return job


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run directory of the same job, killed once in every stage and resumed."""
    choices = random.Random(7)
    job = make_job(tmp_path_factory.mktemp("killed"))
    for stage, longest in KILLED_WITHIN.items():
        _kill_driver_during(job, stage, longest * choices.random())
    run(job, umask=STRICT_UMASK)
    return job.parent / "runs" / "small"


def test_every_stage_is_done_and_a_second_call_does_nothing(undisturbed: Path) -> None:
    run_dir = undisturbed.parent / "runs" / "small"
    stages = record(undisturbed)["stages"]
    assert [stages[stage]["state"] for stage in KILLED_WITHIN] == ["done"] * 5
    assert stages["evaluate"]["metrics"]["validation_images"] == 33
    assert stages["export"]["metrics"]["reload_difference"] == 0
    assert sorted(losses(run_dir, "pretrain")) == list(range(1, 25))
    before = {path: path.stat().st_mtime_ns for path in run_dir.rglob("*") if path.is_file()}
    out = run(undisturbed)
    assert "pretrain: up to date" in out
    assert "nothing to do: every stage is up to date" in out
    touched = [path.name for path, time in before.items() if path.stat().st_mtime_ns != time]
    assert sorted(touched) == ["run.json", "run.jsonl", "run.log", "run.yaml"]


def test_an_export_is_evaluated_without_its_run_on_a_folder_of_validation_images(
    undisturbed: Path, tmp_path: Path
) -> None:
    """The same images and another order of the classes give the accuracy of the run itself."""
    run_dir = undisturbed.parent / "runs" / "small"
    shutil.copytree(run_dir / "export", tmp_path / "model")
    shutil.copytree(undisturbed.parent / "images" / "val", tmp_path / "images" / "val")
    (tmp_path / "images" / "synsets.txt").write_text("c2\nc0\nc1\n")
    job = tmp_path / "evaluate.yaml"
    shutil.copy(ROOT / "jobs" / "evaluate.yaml", job)
    settings = {
        "name": "small",
        "data.root": tmp_path / "images",
        "data.min_side": 16,
        "stages.evaluate.from": tmp_path / "model",
    }
    out = run(job, *(f"--set={key}={value}" for key, value in settings.items()))
    assert "validation images 33" in out
    alone = metrics(tmp_path / "runs" / "small")["evaluate"]
    assert alone == pytest.approx(metrics(run_dir)["evaluate"], rel=1e-4)


def test_the_best_weights_are_evaluated_exported_and_stated(undisturbed: Path) -> None:
    stages = record(undisturbed)["stages"]
    chosen = stages["finetune"]["metrics"]
    assert stages["evaluate"]["metrics"]["top1"] == pytest.approx(chosen["top1"])
    model = json.loads((undisturbed.parent / "runs/small/export/model.json").read_text())
    names = ("kept_step", "selection_top1", "top1")
    assert {name: model["trained"][name] for name in names} == {
        name: chosen[name] for name in names
    }
    figure = f"selection top-1 {chosen['selection_top1']:.1%}  kept step {chosen['kept_step']:.0f}"
    (row,) = [
        line
        for line in (undisturbed.parent / "output").read_text().splitlines()
        if line.lstrip().startswith("finetune") and figure in line
    ]
    assert "done" in row


def test_verify_names_every_damaged_file_of_a_run(undisturbed: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "runs" / "small"
    shutil.copytree(undisturbed.parent / "runs" / "small", run_dir)
    shard = next(run_dir.glob("stages/prepare/images/train-*.parquet"))
    weights = run_dir / "stages/finetune/weights.safetensors"
    for path in (shard, weights):
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    done = subprocess.run(
        [sys.executable, "-m", "pipeline", "verify", "small"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 3, done.stderr
    assert "results of finetune: 1 problem" in done.stdout
    assert "results of export: ok" in done.stdout
    assert "checkpoint step-00000024 of pretrain: ok" in done.stdout
    assert "2 damaged files:" in done.stderr
    for path in (shard, weights):
        assert f"{path.relative_to(tmp_path)}: checksum mismatch" in done.stderr


def _kill_driver_during(job: Path, stage: str, seconds: float) -> None:
    """Start a job, wait for a stage, then that long, and kill the driver alone."""
    process = start(job, umask=STRICT_UMASK)
    if not wait_for(lambda: state(job, stage) == "running", process):
        pytest.fail(f"{stage} was not reached:\n{finish(process)[1]}")
    wait_for(lambda: state(job, stage) != "running", process, seconds)
    process.kill()  # its workers have to notice
    process.communicate()


def test_a_job_killed_in_every_stage_produces_the_same_files(
    undisturbed: Path, killed: Path
) -> None:
    reference = undisturbed.parent / "runs" / "small"
    assert results(killed) == results(reference)
    assert metrics(killed) == metrics(reference)
    for stage in ("pretrain", "finetune"):
        assert losses(killed, stage) == losses(reference, stage)


def _unexpected_modes(run_dir: Path, umask: int) -> dict[str, str]:
    """Files and folders whose permissions are not those that the umask leaves."""
    # safetensors writes to a private ".tmp<random>" first; a killed process leaves it behind.
    paths = [path for path in run_dir.rglob("*") if not path.name.startswith(".tmp")]
    modes = {path: path.stat().st_mode & 0o777 for path in [run_dir, *paths]}
    return {
        str(path.relative_to(run_dir)): f"{mode:03o}"
        for path, mode in modes.items()
        if mode != (0o777 if path.is_dir() else 0o666) & ~umask
    }


def test_every_file_of_a_run_follows_the_umask(undisturbed: Path, killed: Path) -> None:
    assert not _unexpected_modes(undisturbed.parent / "runs" / "small", UMASK)
    assert not _unexpected_modes(killed, STRICT_UMASK)


@pytest.mark.parametrize(
    ("number", "messages"),  # ranks are not in the order of the process IDs
    [
        (signal.SIGKILL, [r"of rank [01] died \(process\)"]),
        (signal.SIGSTOP, [r"rank [01] \(hang\): no progress for", "is stopped by a signal"]),
    ],
)
def test_a_rank_that_ends_or_hangs_is_replaced_and_the_result_is_the_same(
    undisturbed: Path, tmp_path: Path, number: signal.Signals, messages: list[str]
) -> None:
    job = make_job(tmp_path)
    timeout = ["--set", f"cluster.hang_timeout={HANG_S}"]
    process = start(job, "--stage", "prepare", "--stage", "pretrain", *timeout)
    run_dir = tmp_path / "runs" / "small"
    if not wait_for(lambda: any((run_dir / "checkpoints").glob("pretrain/step-*")), process):
        pytest.fail(f"no checkpoint was written:\n{finish(process)[1]}")
    workers = processes(process, "ray::Worker")
    assert len(workers) == 2
    os.kill(workers[1], number)
    code, out = finish(process)
    assert code == 0, out
    for pattern in (*messages, "restarting the processes from the last checkpoint"):
        assert re.search(pattern, out), out
    reference = undisturbed.parent / "runs" / "small"
    assert losses(run_dir, "pretrain") == losses(reference, "pretrain")
    weights = Path("stages/pretrain/weights.safetensors")
    assert (run_dir / weights).read_bytes() == (reference / weights).read_bytes()


def test_a_stop_request_during_a_hang_exits_with_75_within_the_grace(
    undisturbed: Path, tmp_path: Path
) -> None:
    job = tmp_path / "small.yaml"
    shutil.copy(undisturbed, job)
    prepared = Path("runs/small/stages/prepare")
    shutil.copytree(undisturbed.parent / prepared, tmp_path / prepared)
    options = ["--stage", "prepare", "--stage", "pretrain", "--set", "cluster.grace=5"]
    process = start(job, *options)
    run_dir = tmp_path / "runs" / "small"
    events = run_dir / "logs/pretrain.jsonl"
    assert wait_for(lambda: events.exists() and len(losses(run_dir, "pretrain")) >= 2, process)
    workers = processes(process, "ray::Worker")
    os.kill(workers[0], signal.SIGSTOP)
    process.send_signal(signal.SIGTERM)
    began = time.monotonic()
    code, out = finish(process)
    assert code == 75, out
    assert "no checkpoint was written within 5 s" in out
    assert time.monotonic() - began < 5 + 30
    assert not [pid for pid in workers if Path(f"/proc/{pid}").exists()]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stop_request_exits_with_75_and_the_same_command_resumes(
    undisturbed: Path, tmp_path: Path, number: signal.Signals
) -> None:
    reference = undisturbed.parent / "runs" / "small"
    run_dir = tmp_path / "runs" / "small"
    job = tmp_path / "small.yaml"
    shutil.copy(undisturbed, job)
    shutil.copytree(reference / "stages/prepare", run_dir / "stages/prepare")
    process = start(job, "--stage", "prepare", "--stage", "pretrain")
    events = run_dir / "logs/pretrain.jsonl"
    assert wait_for(
        lambda: events.exists() and len(losses(run_dir, "pretrain")) >= 2,
        process,
    )
    os.killpg(process.pid, number)  # as Ctrl-C, scancel and timeout do
    code, out = finish(process)
    assert code == 75, out
    assert "Traceback" not in out
    assert "warning: stopping after the current step" in out
    assert "pretrain stopped after step" in out
    assert "the same command" in out
    assert state(job, "pretrain") == "pending"
    out = run(job, "--stage", "pretrain")
    assert "pretrain: interrupted, resuming" in out
    assert losses(run_dir, "pretrain") == losses(reference, "pretrain")
