"""The command runs: one line per run, with its real state."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from typer.testing import CliRunner

from pipeline import cli
from pipeline.files import write_json
from pipeline.layout import RunDir, find_run
from pipeline.monitor.events import EventWriter
from pipeline.orchestrate.run_list import age, overviews
from pipeline.orchestrate.run_lock import run_lock
from pipeline.orchestrate.run_state import RunState

STAGES = ["prepare", "pretrain", "evaluate"]


def make_run(folder: Path, name: str, *, done: int = 0) -> tuple[RunDir, RunState]:
    """A run of which the first ``done`` stages are done."""
    run_dir = RunDir(folder / name)
    state = RunState(run_dir, name)
    state.declare(STAGES)
    for stage in STAGES[:done]:
        state.start(stage, {}, from_scratch=True)
        state.finish(stage, 1.0, {}, {"images": 1200.0} if stage == "prepare" else {"top1": 0.762})
    return run_dir, state


def shown(folder: Path) -> dict[str, str]:
    """The line of each run, with single spaces."""
    result = CliRunner().invoke(
        cli.app, ["runs", "--runs-dir", str(folder)], catch_exceptions=False
    )
    assert result.exit_code == 0
    lines = [" ".join(line.split()) for line in result.stdout.splitlines()]
    assert lines[0] in ("run state stage last age", "run state stage last left age")
    return {line.split()[0]: line for line in lines[1:]}


def test_each_run_is_listed_with_state_stage_last_metric_and_age(tmp_path: Path) -> None:
    make_run(tmp_path, "fresh")
    make_run(tmp_path, "prepared", done=1)
    finished, _ = make_run(tmp_path, "finished", done=3)
    _, state = make_run(tmp_path, "broken", done=1)
    state.start("pretrain", {}, from_scratch=True)
    state.stop("pretrain", 5.0, "out of memory")
    os.utime(finished.run_json, times=(0, finished.run_json.stat().st_mtime - 7300))
    lines = shown(tmp_path)
    assert lines["fresh"].startswith("fresh not started prepare ")
    assert lines["prepared"].startswith("prepared interrupted pretrain images 1,200 ")
    assert lines["broken"].startswith("broken failed pretrain images 1,200 ")
    assert lines["finished"] == "finished done evaluate top-1 76.2% 2 h"
    assert list(lines)[-1] == "finished"  # the oldest


def test_the_lock_tells_a_running_stage_from_a_killed_one(tmp_path: Path) -> None:
    run_dir, state = make_run(tmp_path, "mine", done=1)
    state.start("pretrain", {}, from_scratch=True)
    writer = EventWriter(run_dir.events("pretrain"))
    writer.write("step", 20, total=400, epoch=1, scalars={"loss/total": 4.0})
    assert "mine interrupted pretrain step 20/400 loss 4.0000" in shown(tmp_path)["mine"]
    writer.write("evaluation", 30, scalars={"accuracy/top1": 0.45})
    writer.write("start", 1030)
    # Rates are those of the present attempt: 3 s for each of the 2,960 steps that remain.
    clock = iter((1000.0, 1030.0))
    writer = EventWriter(run_dir.events("pretrain"), clock=lambda: next(clock))
    writer.write("step", 1030, total=4000, epoch=2, scalars={"loss/total": 3.0})
    writer.write("step", 1040, total=4000, epoch=2, scalars={"loss/total": 3.0})
    with run_lock(run_dir):
        line = shown(tmp_path)["mine"]
    assert "mine running pretrain step 1,040/4,000 top-1 45.0% 2:28:00" in line


def test_hours_on_gpus_count_every_gpu_of_every_machine(tmp_path: Path) -> None:
    run_dir, state = make_run(tmp_path, "mine", done=1)
    cluster = {"kind": "slurm", "nodes": 2, "devices_per_node": 4, "device": "cuda"}
    write_json(run_dir.started_with("pretrain"), {"cluster": cluster})
    state.start("pretrain", {}, from_scratch=True)
    state.stop("pretrain", 1800.0)
    (line,) = overviews(tmp_path)
    assert line.gpu_hours == pytest.approx(2 * 4 * 0.5)


def test_a_look_at_the_runs_does_not_keep_a_run_from_starting(tmp_path: Path) -> None:
    run_dir, _ = make_run(tmp_path, "mine")
    with run_lock(run_dir):
        shown(tmp_path)
    with run_lock(run_dir):  # the look has left nothing behind
        pass


def test_a_damaged_run_is_named_and_hides_no_other(tmp_path: Path) -> None:
    run_dir, _ = make_run(tmp_path, "damaged")
    run_dir.run_json.write_text("{")
    make_run(tmp_path, "finished", done=3)
    (tmp_path / "not_a_run").mkdir()
    lines = shown(tmp_path)
    assert sorted(lines) == ["damaged", "finished"]
    assert lines["damaged"].startswith("damaged unreadable run.json is damaged")


def test_without_runs_a_first_one_is_suggested(tmp_path: Path) -> None:
    result = CliRunner().invoke(cli.app, ["runs", "--runs-dir", str(tmp_path)])
    assert result.exit_code == 0
    assert result.stdout == ""
    assert "a first one: pipeline run quickstart" in result.stderr


def test_a_run_is_found_by_its_name_or_its_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_run(tmp_path / "runs", "mine")
    monkeypatch.chdir(tmp_path)
    for target in ("mine", "runs/mine", tmp_path / "runs" / "mine"):
        run_dir = find_run(target, Path("runs"))
        assert run_dir is not None
        assert run_dir.run_json.is_file()
    assert find_run("other", Path("runs")) is None


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0 s"), (59, "59 s"), (60, "1 min"), (7300, "2 h"), (2e5, "2 d")]
)
def test_an_age_is_given_in_its_largest_unit(seconds: float, text: str) -> None:
    assert age(seconds) == text
