"""C8: changed settings are listed, and each is allowed or refused when a stage resumes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pipeline.config.load import load_job
from pipeline.config.resume_diff import changes
from pipeline.errors import ConfigError
from pipeline.layout import RunDir
from pipeline.orchestrate.resume_policy import decide
from pipeline.orchestrate.run_state import StageRecord
from tests.config.jobs import JOB, write

TWO = JOB.replace("  toy:", '  other: {root: "/other"}\n  toy:').replace(
    "    epochs: 3", "    epochs: 3\n    data: toy"
)
TWO = TWO.replace("recipe: quickstart_finetune,", "recipe: quickstart_finetune, data: toy,")


@pytest.fixture
def resolved(tmp_path: Path) -> Any:
    path = write(tmp_path, TWO)
    return lambda *overrides: load_job(path, overrides).resolved()


@pytest.mark.parametrize(
    ("override", "stage", "allowed"),
    [
        ("stages.pretrain.log_every_steps=3", "pretrain", True),
        ("stages.pretrain.micro_batch=8", "pretrain", True),
        ("stages.pretrain.zero_stage=3", "pretrain", True),
        ("stages.pretrain.checkpoint_every_steps=5", "pretrain", True),
        ("stages.pretrain.keep_checkpoints=5", "pretrain", True),
        ("cluster.processes=7", "pretrain", True),
        ("model.activations=stored", "pretrain", True),
        ("model.compile=true", "pretrain", True),
        ("data.toy.root=/moved", "pretrain", True),
        ("stages.evaluate.batch=3", "evaluate", True),
        ("model.columns=5", "pretrain", False),
        ("model.channels=[8, 16, 32, 64]", "pretrain", False),
        ("seed=1", "pretrain", False),
        ("stages.pretrain.base_lr=1", "pretrain", False),
        ("stages.pretrain.epochs=9", "pretrain", False),
        ("stages.pretrain.global_batch=8", "pretrain", False),
        ("stages.pretrain.augment.mixup=0", "pretrain", False),
        ("data.toy.short_side=100", "pretrain", False),
        ("data.toy.root=/moved", "prepare", False),
        ("data.toy.shard_rows=5", "prepare", False),
        ("data.other.classes=imagenet1k", "prepare", False),
        ("model.columns=5", "evaluate", False),
        ("stages.evaluate.image_size=128", "evaluate", False),
    ],
)
def test_c8_each_kind_of_change_is_allowed_or_refused(
    resolved: Any, override: str, stage: str, allowed: bool
) -> None:
    differences = changes(resolved(), resolved(override), stage)
    assert [change.key for change in differences] == [override.partition("=")[0]]
    assert differences[0].allowed is allowed
    assert changes(resolved(), resolved(), stage) == []


@pytest.mark.parametrize(
    ("override", "stage"),
    [
        ("name=other", "pretrain"),
        ("stages.finetune.base_lr=1", "pretrain"),
        ("data.other.root=/moved", "pretrain"),
        ("data.other.classes=imagenet1k", "evaluate"),
        ("model.columns=5", "prepare"),
        ("stages.pretrain.base_lr=1", "prepare"),
        ("stages.pretrain.log_every_steps=1", "export"),
    ],
)
def test_change_outside_a_stage_is_not_listed(resolved: Any, override: str, stage: str) -> None:
    assert changes(resolved(), resolved(override), stage) == []


def test_evaluation_depends_on_the_dataset_of_its_source_stage(resolved: Any) -> None:
    assert [
        change.key for change in changes(resolved(), resolved("data.toy.short_side=9"), "evaluate")
    ] == ["data.toy.short_side"]
    keys = [
        change.key
        for change in changes(resolved(), resolved("stages.finetune.data=other"), "evaluate")
    ]
    assert "data.toy.layout" in keys
    assert "data.other.layout" in keys


def test_synthetic_source_instead_of_a_real_one_is_listed(resolved: Any) -> None:
    differences = changes(resolved(), resolved("data.toy.synthetic={classes: 3}"), "pretrain")
    assert differences[0].key == "data.toy.synthetic"
    assert (differences[0].old, differences[0].new) == (None, "(not there)")
    assert {change.key for change in differences} > {
        "data.toy.synthetic.classes",
        "data.toy.synthetic.seed",
    }


def decision(resolved: Any, override: str, state: Any, tmp_path: Path, **options: Any) -> Any:
    record = StageRecord(state=state, inputs={"data": "d"})
    return decide(
        "pretrain",
        record,
        started_with=resolved(),
        resolved=resolved(override),
        inputs={"data": "d"},
        run_dir=RunDir(tmp_path),
        **options,
    )


@pytest.mark.parametrize("state", ["running", "failed", "pending"])
def test_c8_an_interrupted_stage(resolved: Any, tmp_path: Path, state: str) -> None:
    going_on = decision(resolved, "stages.pretrain.log_every_steps=3", state, tmp_path)
    assert going_on.action == "resume"
    assert "stages.pretrain.log_every_steps 10 -> 3" in going_on.reason
    with pytest.raises(ConfigError) as error:
        decide(
            "pretrain",
            StageRecord(state=state),
            started_with=resolved(),
            resolved=resolved("model.columns=5", "stages.pretrain.log_every_steps=3"),
            inputs={},
            run_dir=RunDir(tmp_path),
        )
    assert error.value.message == (
        "stages.pretrain: it was interrupted, and its settings have changed since:\n"
        "    stages.pretrain.log_every_steps: 10 -> 3  (may change)\n"
        "    model.columns: 4 -> 5  (refused)\n"
        "  -> restore the settings, give the job another name, or restart the stage from scratch: "
        "--stage pretrain --force"
    )


def test_c8_a_finished_stage(resolved: Any, tmp_path: Path) -> None:
    assert decision(resolved, "seed=0", "done", tmp_path).action == "skip"
    assert (
        decision(resolved, "stages.pretrain.log_every_steps=3", "done", tmp_path).action == "skip"
    )
    restart = decision(resolved, "model.columns=5", "done", tmp_path)
    assert restart.action == "restart"
    assert "model.columns 4 -> 5" in restart.reason
    assert decision(resolved, "seed=0", "done", tmp_path, force=True).action == "restart"
