"""``--rehearse``: every shipped job shrinks to minutes and needs no input."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.config import job_queries, machine, render
from pipeline.config.check import check
from pipeline.config.job_queries import training_stages
from pipeline.config.load import load_job
from pipeline.config.schema import TrainConfig
from pipeline.config.schema.shrink import RehearsalContext, narrow, small_image_sizes
from pipeline.errors import ConfigError
from tests.config.jobs import ROOT, SHIPPED, VARIABLES, each_training_job

# Keys of a training stage that a rehearsal must not change.
KEPT = {
    "precision",
    "zero_stage",
    "intermediate_supervision",
    "base_lr",
    "base_lr_batch",
    "layer_decay",
    "ema_decay",
    "augment",
    "clip_grad",
    "initial",
}
PUBLISHED = [path for path in SHIPPED if "revcol" in path.stem]


@each_training_job
def test_rehearsal_needs_no_source_and_no_variable(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    loaded = load_job(path, rehearse=True)
    job = loaded.job
    check(job, machine.world_size(job.cluster), loaded.origins)
    assert job.name.endswith("-rehearsal")
    assert machine.world_size(job.cluster) == 2
    assert job.model.channels[0] <= 12
    assert all(dataset.synthetic is not None and not dataset.root for dataset in job.data.values())
    for stage in training_stages(job):
        config = job_queries.train_config(job, stage)
        assert config.max_steps == 8
        assert job_queries.batches(config, 2) == (4, 2)
        assert loaded.origins[f"stages.{stage}.global_batch"] == "rehearse"
    plan = render.dry_run(loaded).partition("# Plan")[2]
    for name in job.data:
        assert f"{name} (synthetic)" in plan


def test_a_rehearsal_accumulates_unless_zero_1_with_bf16_cannot() -> None:
    path = ROOT / "jobs/quickstart.yaml"
    settings = ["stages.pretrain.zero_stage=1", "stages.pretrain.precision=bf16"]
    job = load_job(path, settings, rehearse=True).job
    check(job, 2)
    assert job_queries.batches(job_queries.train_config(job, "pretrain"), 2) == (8, 1)
    assert job_queries.batches(job_queries.train_config(job, "finetune"), 2) == (4, 2)


def test_kept_keys_are_keys_of_the_schema() -> None:
    assert set(TrainConfig.model_fields) > KEPT


@pytest.mark.usefixtures("environment")
@pytest.mark.parametrize("path", PUBLISHED, ids=lambda path: path.stem)
def test_rehearsal_changes_only_sizes(path: Path) -> None:
    large = load_job(path).job
    small = load_job(path, rehearse=True).job
    assert job_queries.stage_names(small) == job_queries.stage_names(large)
    shrunk = {"channels", "compile"}
    assert small.model.model_dump(exclude=shrunk) == large.model.model_dump(exclude=shrunk)
    assert {name: data.classes for name, data in small.data.items()} == {
        name: data.classes for name, data in large.data.items()
    }
    for stage in training_stages(large):
        small_stage = job_queries.train_config(small, stage)
        large_stage = job_queries.train_config(large, stage)
        assert small_stage.model_dump(include=KEPT) == large_stage.model_dump(include=KEPT)
    if large.stages.finetune is not None:
        assert small.stages.pretrain is not None
        assert small.stages.finetune is not None
        assert small.stages.finetune.image_size > small.stages.pretrain.image_size


def test_rehearsal_refuses_a_job_that_cannot_work_at_its_real_size(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    overrides = [
        "stages.pretrain.image_size=225",
        "stages.finetune.from=pretrian",
        "cluster.processes=3",
    ]
    with pytest.raises(ConfigError) as error:
        load_job(ROOT / "jobs/pretrain_revcol_h.yaml", overrides, rehearse=True)
    message = error.value.message
    assert "--set: stages.pretrain.image_size: 225 pixels is not a multiple of 32" in message
    assert "4096 images cannot be shared evenly by 3 processes\n  -> take 4095 or 4098" in message
    assert "'pretrian' is neither a training stage nor a weights file" in message


def test_rehearsal_drops_weights_of_the_real_width() -> None:
    overrides = ["stages.pretrain.from=elsewhere.safetensors"]
    loaded = load_job(ROOT / "jobs/revcol_tiny_1k.yaml", overrides, rehearse=True)
    assert loaded.job.stages.pretrain is not None
    assert loaded.job.stages.pretrain.initial == ""
    assert any("stages.pretrain.from" in note for note in loaded.notes)


def test_rehearsal_changes_exactly_these_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole list, so that a new rule of a key is a deliberate change of this test."""
    monkeypatch.setenv("IMAGENET1K", "/images")
    path = ROOT / "jobs/revcol_tiny_1k.yaml"
    small = load_job(path, ["stages.pretrain.repeated_augmentation=4"], rehearse=True)
    changed = {key for key, origin in small.origins.items() if origin == "rehearse"}
    assert changed == {
        "name",
        "model.channels",
        "model.compile",
        "cluster.device",
        "cluster.processes",
        *(f"data.images.{key}" for key in ("root", "synthetic", "max_rejected", "shard_rows")),
        *(
            f"data.images.synthetic.{key}"
            for key in (
                "classes",
                "images_per_class",
                "validation_per_class",
                "min_size",
                "max_size",
                "corrupt_fraction",
                "seed",
            )
        ),
        *(
            f"stages.pretrain.{key}"
            for key in (
                "image_size",
                "epochs",
                "max_steps",
                "global_batch",
                "micro_batch",
                "repeated_augmentation",
                "warmup_epochs",
                "log_every_steps",
                "checkpoint_every_steps",
            )
        ),
    }


def test_rehearsal_reports_each_change_with_both_values() -> None:
    notes = load_job(ROOT / "jobs/quickstart.yaml", rehearse=True).notes
    assert "rehearsal: name quickstart -> quickstart-rehearsal" in notes
    assert "rehearsal: stages.pretrain.epochs 4 -> 1" in notes
    assert "rehearsal: stages.pretrain.max_steps null -> 8" in notes
    synthetic = [note for note in notes if ".synthetic = " in note]
    assert len(synthetic) == 2
    assert synthetic[0].startswith("rehearsal: data.toy22k.synthetic = classes 24, images_per_")


def test_equal_image_sizes_stay_equal_and_none_grows() -> None:
    assert small_image_sizes([224, 384, 384]) == {224: 64, 384: 96}
    assert small_image_sizes([32, 64]) == {32: 32, 64: 64}
    assert small_image_sizes([96, 128, 160, 192, 224]) == {
        96: 64,
        128: 96,
        160: 128,
        192: 160,
        224: 160,
    }


def test_widths_keep_their_proportions() -> None:
    context = RehearsalContext(image_sizes={})
    assert narrow([72, 144, 288, 576], context) == [12, 24, 48, 96]
    assert narrow([8, 16, 32, 64], context) == [8, 16, 32, 64]
