"""Restarts keep the fence of live process groups; run.json of the previous version is read."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from pipeline.config.stage_settings import keep_settings, settings_of
from pipeline.errors import ConfigError, StageError
from pipeline.layout import RunDir
from pipeline.orchestrate.resume_policy import decide, move_aside
from pipeline.orchestrate.run_lock import run_lock
from pipeline.orchestrate.run_state import RunState, StageRecord, read_run_state
from pipeline.orchestrate.supervisor import claim_generation

# As written by the version before, which called the metrics "figures".
OLD_RUN_JSON = """{
  "format": 1,
  "name": "quickstart",
  "stages": {
    "prepare": {
      "state": "done", "seconds": 3.5, "inputs": {"data.set": "abc"}, "outputs": {},
      "figures": {"images": 2048.0}, "error": ""
    },
    "pretrain": {
      "state": "pending", "seconds": 20.25, "inputs": {"data": "d"}, "outputs": {},
      "figures": {}, "error": ""
    },
    "finetune": {
      "state": "done", "seconds": 9.0, "inputs": {"data": "d"},
      "outputs": {"stages/finetune/weights.json": {"digest": "0", "size": 2, "modified": 1}},
      "figures": {"top1": 0.75, "loss": 1.5}, "error": ""
    }
  }
}
"""


@pytest.fixture
def run_dir(tmp_path: Path) -> RunDir:
    return RunDir(tmp_path)


def test_run_json_of_the_previous_version_is_read(run_dir: RunDir) -> None:
    run_dir.run_json.write_text(OLD_RUN_JSON)
    record = read_run_state(run_dir)
    assert record is not None
    assert record.stages["prepare"].metrics == {"images": 2048.0}
    assert record.stages["finetune"].metrics == {"top1": 0.75, "loss": 1.5}
    assert record.stages["finetune"].outputs["stages/finetune/weights.json"].size == 2


def test_a_run_of_the_previous_version_resumes(run_dir: RunDir) -> None:
    run_dir.run_json.write_text(OLD_RUN_JSON)
    settings = {"seed": 0, "stages": {"pretrain": {"epochs": 3}}}
    keep_settings(run_dir, "pretrain", settings)
    state = RunState(run_dir, "quickstart")
    decision = decide(
        "pretrain",
        state.stage("pretrain"),
        started_with=settings_of(run_dir, "pretrain"),
        resolved=settings,
    )
    assert (decision.action, decision.reason) == ("resume", "interrupted, resuming")
    state.start("pretrain", {"data": "d"}, from_scratch=False)
    state.finish("pretrain", 1.0, {}, {"top1": 0.5, "loss": float("nan")})
    written = json.loads(run_dir.run_json.read_text())["stages"]
    assert written["pretrain"]["metrics"] == {"top1": 0.5}
    assert written["pretrain"]["seconds"] == 21.25
    assert written["finetune"]["metrics"] == {"top1": 0.75, "loss": 1.5}
    assert not any("figures" in record for record in written.values())


EPOCHS = {"seed": 0, "stages": {"pretrain": {"epochs": 3, "log_every_steps": 10}}}
MORE_EPOCHS = {"seed": 0, "stages": {"pretrain": {"epochs": 4, "log_every_steps": 10}}}
OTHER_LOG = {"seed": 0, "stages": {"pretrain": {"epochs": 3, "log_every_steps": 50}}}
DONE = StageRecord(state="done")
FAILED = StageRecord(state="failed")
CHANGED = "stages.pretrain.epochs: 3 -> 4"


@pytest.mark.parametrize(
    ("record", "resolved", "facts", "action", "reason"),
    [
        (StageRecord(), EPOCHS, {"started_with": None}, "start", "starting"),
        (DONE, EPOCHS, {}, "skip", "up to date"),
        (DONE, OTHER_LOG, {}, "skip", "up to date"),
        (DONE, EPOCHS, {"damaged": ["a/b"]}, "repair", "a/b is missing or damaged, writing it"),
        (DONE, EPOCHS, {"started_with": None}, "skip", "up to date"),
        (DONE, MORE_EPOCHS, {}, "restart", f"{CHANGED}; running again"),
        (DONE, MORE_EPOCHS, {"at_stake": "9 steps"}, "refuse", "9 steps"),
        (DONE, EPOCHS, {"at_stake": "9 steps", "input_changes": ["x"]}, "refuse", "9 steps"),
        (FAILED, EPOCHS, {"at_stake": "9 steps"}, "resume", "failed last time, resuming"),
        (FAILED, OTHER_LOG, {"at_stake": "9 steps"}, "resume", "log_every_steps: 10 -> 50"),
        (FAILED, MORE_EPOCHS, {"at_stake": "9 steps"}, "refuse", "9 steps"),
        (FAILED, MORE_EPOCHS, {}, "restart", f"{CHANGED}; running again"),
    ],
)
def test_c8_each_rule_of_the_policy(
    record: StageRecord,
    resolved: dict[str, object],
    facts: dict[str, Any],
    action: str,
    reason: str,
) -> None:
    given = {"started_with": EPOCHS} | facts
    decision = decide("pretrain", record, resolved=resolved, **given)
    assert decision.action == action
    assert reason in decision.reason


def test_a_damaged_run_json_is_named(run_dir: RunDir) -> None:
    run_dir.run_json.write_text('{"format": 1, "stages": {"pretrain": {"state": "gone"}}}')
    with pytest.raises(StageError, match=r"run\.json: is not the state of a run") as error:
        read_run_state(run_dir)
    assert f"`mv {run_dir.run_json} {run_dir.run_json}.damaged`" in error.value.remedy


def test_a_second_process_is_refused_with_the_id_of_the_first(run_dir: RunDir) -> None:
    with (
        run_lock(run_dir),
        pytest.raises(ConfigError, match=rf"process {os.getpid()} on \S+ is working on this run"),
        run_lock(run_dir),
    ):
        pass
    with run_lock(run_dir):  # released
        pass


def _results(run_dir: RunDir, stage: str) -> list[Path]:
    """Files as a finished training stage leaves them."""
    files = [
        run_dir.weights(stage),
        run_dir.checkpoints(stage) / "step-00000005" / "manifest.json",
        run_dir.tensorboard(stage) / "events",
        run_dir.events(stage),
    ]
    for file in files:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(file.name)
    keep_settings(run_dir, stage, {"seed": 0})
    return [*files, run_dir.started_with(stage)]


def test_generations_rise_across_a_restart_from_scratch(run_dir: RunDir) -> None:
    fence = run_dir.fence("pretrain")
    assert [claim_generation(fence) for _ in range(2)] == [0, 1]
    files = _results(run_dir, "pretrain")
    target = move_aside(run_dir, "pretrain")
    assert target is not None
    assert target.parent == run_dir.replaced
    for file in files:
        assert not file.exists()
        assert (target / file.relative_to(run_dir.path)).exists()
    # A group of generation 1 may still be alive: it must neither miss the fence nor pass it.
    assert fence.read_text() == "1"
    assert claim_generation(fence) == 2


def test_the_fence_exists_at_every_moment_of_a_restart(
    run_dir: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    fence = run_dir.fence("pretrain")
    claim_generation(fence)
    _results(run_dir, "pretrain")
    rename = Path.rename
    moved: list[str] = []

    def watched(path: Path, target: Path) -> Path:
        assert fence.exists()
        moved.append(path.name)
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", watched)
    move_aside(run_dir, "pretrain")
    assert fence.exists()
    # The settings go last: a restart that is cut short is decided, and done, once more.
    assert moved[-1] == run_dir.started_with("pretrain").name


def test_moving_aside_without_results_does_nothing(run_dir: RunDir) -> None:
    assert move_aside(run_dir, "pretrain") is None
    claim_generation(run_dir.fence("pretrain"))
    assert move_aside(run_dir, "pretrain") is None
    assert not run_dir.replaced.exists()
