"""C8: settings that differ are listed, and whether the result of the stage depends on them."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Annotated, Any

import pytest
from pydantic import Field

from pipeline.config import resume_diff
from pipeline.config.load import load_job
from pipeline.config.resume_diff import changes
from pipeline.config.schema import DatasetConfig, Job, ModelConfig, Section
from pipeline.config.schema.rules import NOTHING, Rules
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
    ("override", "stage", "changes_result"),
    [
        ("stages.pretrain.log_every_steps=3", "pretrain", False),
        ("stages.pretrain.micro_batch=8", "pretrain", False),
        ("stages.pretrain.zero_stage=3", "pretrain", False),
        ("stages.pretrain.checkpoint_every_steps=5", "pretrain", False),
        ("stages.pretrain.keep_checkpoints.last=5", "pretrain", False),
        ("stages.finetune.from=/weights.safetensors", "finetune", False),
        ("cluster.processes=7", "pretrain", False),
        ("model.activations=stored", "pretrain", False),
        ("model.compile=true", "pretrain", False),
        ("data.toy.root=/moved", "prepare", False),
        ("data.toy.max_rejected=0.5", "prepare", False),
        ("stages.evaluate.batch=3", "evaluate", False),
        ("model.drop_path=0.3", "evaluate", False),
        ("model.columns=5", "pretrain", True),
        ("model.channels=[8, 16, 32, 64]", "pretrain", True),
        ("seed=1", "pretrain", True),
        ("stages.pretrain.base_lr=1", "pretrain", True),
        ("stages.pretrain.epochs=9", "pretrain", True),
        ("stages.pretrain.global_batch=8", "pretrain", True),
        ("stages.pretrain.augment.mixup=0.3", "pretrain", True),
        ("data.toy.shard_rows=5", "prepare", True),
        ("data.other.classes=imagenet1k", "prepare", True),
        ("model.columns=5", "evaluate", True),
        ("stages.evaluate.image_size=128", "evaluate", True),
    ],
)
def test_c8_each_change_is_listed_with_its_effect(
    resolved: Any, override: str, stage: str, changes_result: bool
) -> None:
    differences = changes(resolved(), resolved(override), stage)
    assert [change.key for change in differences] == [override.partition("=")[0]]
    assert differences[0].changes_result is changes_result
    assert changes(resolved(), resolved(), stage) == []


@pytest.mark.parametrize(
    ("override", "stage"),
    [
        ("name=other", "pretrain"),
        ("stages.finetune.base_lr=1", "pretrain"),
        # The prepared dataset is an input of training, compared by its fingerprint.
        ("data.toy.root=/moved", "pretrain"),
        ("data.toy.max_rejected=0.5", "pretrain"),
        ("data.toy.short_side=100", "pretrain"),
        ("data.other.classes=imagenet1k", "evaluate"),
        ("model.columns=5", "prepare"),
        ("stages.pretrain.base_lr=1", "prepare"),
        ("stages.pretrain.log_every_steps=1", "export"),
    ],
)
def test_change_outside_a_stage_is_not_listed(resolved: Any, override: str, stage: str) -> None:
    assert changes(resolved(), resolved(override), stage) == []


def test_synthetic_source_instead_of_a_real_one_is_listed(resolved: Any) -> None:
    differences = changes(resolved(), resolved("data.toy.synthetic={classes: 3}"), "prepare")
    assert differences[0].key == "data.toy.synthetic"
    assert (differences[0].old, differences[0].new) == (None, "(not there)")
    assert {change.key for change in differences} > {
        "data.toy.synthetic.classes",
        "data.toy.synthetic.seed",
    }


@pytest.mark.parametrize("stage", ["prepare", "pretrain", "finetune", "evaluate", "export"])
@pytest.mark.parametrize(
    "path",
    [
        ("cluster",),
        ("cluster", "prefetch_mib"),
        ("model", "fraction_bits"),
        ("data", "toy", "jpeg_quality"),
        ("data", "other", "synthetic"),
        ("stages", "prepare", "data"),
        ("stages", "pretrain", "betas"),
        ("stages", "finetune", "max_steps"),
        ("stages", "finetune", "augment", "crop_ratio"),
        ("stages", "evaluate", "image_size"),
    ],
    ids=".".join,
)
def test_key_that_the_record_lacks_has_its_default(
    resolved: Any, path: tuple[str, ...], stage: str
) -> None:
    recorded = copy.deepcopy(resolved())
    section = recorded
    for part in path[:-1]:
        section = section[part]
    del section[path[-1]]
    assert changes(recorded, resolved(), stage) == []


def test_key_that_the_record_lacks_and_the_job_sets_is_a_change(resolved: Any) -> None:
    recorded = copy.deepcopy(resolved())
    del recorded["model"]["fraction_bits"]
    differences = changes(recorded, resolved("model.fraction_bits=20"), "pretrain")
    assert [str(change) for change in differences] == ["model.fraction_bits: 18 -> 20"]


class Warmth(Section):
    """A section that only the later version of the schema has."""

    degrees: float = Field(20.0, description="Degrees.")
    names: tuple[str, ...] = Field(("a", "b"), description="Names.")


class LaterModel(ModelConfig):
    warmth: Warmth = Field(default_factory=Warmth, description="A new section.")
    tint: str = Field("none", description="A new key.")


class LaterDataset(DatasetConfig):
    gamma: float = Field(1.0, description="A new key of every dataset.")


class LaterJob(Job):
    """The schema after an upgrade, with the rules that the real one has."""

    model: Annotated[LaterModel, Rules(changes=("pretrain", "finetune"))] = Field(description="")
    data: Annotated[dict[str, LaterDataset], Rules(changes=("prepare",))] = Field(description="")
    colour: Annotated[str, Rules(changes=NOTHING)] = Field("red", description="A new key.")


STAGES = ("prepare", "pretrain", "finetune", "evaluate", "export")


def test_c8_an_upgrade_of_the_schema_changes_no_stage(
    resolved: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = resolved()
    after = LaterJob.model_validate(before).model_dump(mode="json", by_alias=True)
    assert after["model"]["warmth"] == {"degrees": 20.0, "names": ["a", "b"]}
    # 1. The later version resumes a run of the earlier one: it has new keys, all at their default.
    with monkeypatch.context() as later:
        later.setattr(resume_diff, "Job", LaterJob)
        assert [change for stage in STAGES for change in changes(before, after, stage)] == []
        after["model"]["warmth"]["degrees"] = 30.0
        after["data"]["toy"]["gamma"] = 2.0
        assert [str(change) for change in changes(before, after, "pretrain")] == [
            "model.warmth.degrees: 20.0 -> 30.0"
        ]
        assert [str(change) for change in changes(before, after, "prepare")] == [
            "data.toy.gamma: 1.0 -> 2.0"
        ]
    # 2. The earlier version resumes a run of the later one: nothing reads the removed keys.
    assert [change for stage in STAGES for change in changes(after, before, stage)] == []
