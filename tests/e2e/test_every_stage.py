"""Every ZeRO stage, precision and kind of block through all stages of a small job.

The stages run as under Ray, one process group per stage, but without Ray, which does not depend on
what varies here. The prepared dataset is shared.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from pipeline.blocks import registry
from pipeline.checkpoint.manifest import Manifest, list_checkpoints
from pipeline.config.schema import Job
from pipeline.errors import Interrupted
from pipeline.export import official
from pipeline.export.reload import load_export
from pipeline.export.stage import export_stage
from pipeline.layout import RunDir
from pipeline.orchestrate.artifacts import outputs
from pipeline.prepare.stage import prepare_stage
from tests.prepare.source_folders import class_tars, serial
from tests.train import processes, staging

STEPS = 4
COMBINATIONS = [(0, "fp32"), *((zero, dtype) for zero in (1, 2, 3) for dtype in ("fp32", "bf16"))]
MIXED = ["convnext", "c2f", "transformer", "c2f"]
BLOCKS: list[Any] = [*registry.facts(), MIXED]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return class_tars(tmp_path_factory.mktemp("source"), classes=3, count=12, validation=4)


@pytest.fixture(scope="module")
def prepared(source: Path, tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    run_dir = RunDir(tmp_path_factory.mktemp("prepared"))
    prepare_stage(
        make_job(source), run_dir, serial, lambda *_: None, lambda text, level="info": None
    )
    return run_dir


def make_job(source: Path, block: Any = "convnext", **training: Any) -> Job:
    """Four steps of pretraining, a checkpoint at each second one; two steps of fine-tuning."""
    common = {"global_batch": 8, "log_every_steps": 1, "micro_batch": 2} | training
    pretrain = {"max_steps": STEPS, "checkpoint_every_steps": 2} | common
    finetune = {"max_steps": 2, "image_size": 32} | common
    job = staging.job(pretrain, finetune, block=block, drop_path=0)
    data = {staging.DATASET: {"root": str(source), "min_side": 16}}
    return Job.model_validate(job.model_dump(by_alias=True) | {"data": data})


def run_after_prepare(run_dir: RunDir, world_size: int, job: Job) -> dict[str, float]:
    """Run the stages after 'prepare', pretraining from where it is; the metrics of the export."""
    for stage in ("pretrain", "finetune"):
        trained = staging.run_stage(run_dir, world_size, job, stage)
        assert all(isinstance(metrics, dict) for metrics in trained), trained
    (evaluated, *_) = processes.run(
        run_dir.logs / "output", world_size, staging.evaluate, job, run_dir
    )
    assert evaluated["validation_images"] == 12, evaluated
    return export_stage(job, run_dir)


def stop_and_resume(run_dir: RunDir, world_size: int, job: Job) -> None:
    """Pretrain until a stop request after the second step, then to the end."""
    stopped = staging.run_stage(run_dir, world_size, job, stop=staging.StopAfter(2, 0))
    assert all(isinstance(error, Interrupted) for error in stopped), stopped
    staging.run_stage(run_dir, world_size, job)
    assert "resuming from step" in staging.messages(run_dir)


@pytest.mark.parametrize(("zero_stage", "precision"), COMBINATIONS)
def test_every_zero_stage_and_precision_goes_through_all_stages(
    zero_stage: int, precision: str, source: Path, prepared: RunDir, tmp_path: Path
) -> None:
    shutil.copytree(prepared.path, tmp_path / "run")
    # ZeRO 1 accumulates nothing in bf16.
    batch = {"micro_batch": 4} if (zero_stage, precision) == (1, "bf16") else {}
    job = make_job(source, zero_stage=zero_stage, precision=precision, **batch)
    run_dir = RunDir(tmp_path / "run")
    assert run_after_prepare(run_dir, 2, job)["reload_difference"] == 0
    losses = [*staging.losses(run_dir).values(), *staging.losses(run_dir, "finetune").values()]
    assert len(losses) == STEPS + 2
    assert torch.tensor(losses).isfinite().all()


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block if block != MIXED else "mixed")
def test_every_kind_of_block_goes_through_all_stages(
    block: Any, world_size: int, source: Path, prepared: RunDir, tmp_path: Path
) -> None:
    names = [block] if isinstance(block, str) else block
    kinds = [registry.facts()[name] for name in names]
    shutil.copytree(prepared.path, tmp_path / "run")
    run_dir = RunDir(tmp_path / "run")
    job = make_job(source, block, ema_decay=0.5)
    with_statistics = any(kind.running_statistics for kind in kinds)
    if with_statistics:
        shutil.copytree(prepared.path, tmp_path / "uninterrupted")
        uninterrupted = RunDir(tmp_path / "uninterrupted")
        staging.run_stage(uninterrupted, world_size, job)
        stop_and_resume(run_dir, world_size, job)
    assert run_after_prepare(run_dir, world_size, job)["reload_difference"] == 0
    if with_statistics:
        assert_statistics_are_kept(run_dir, uninterrupted)
    # The published file is there where the published code has such a network.
    published = all(kind.published_names for kind in kinds)
    assert (run_dir.export / "revcol.pth").exists() is published
    assert any(path.endswith("revcol.pth") for path in outputs(job, "export", run_dir)) is published
    card = load_export(run_dir.export)
    assert official.has_published_names(card.network.spec) is published
    assert (card.description["published_names"] == "revcol.pth") is published


def assert_statistics_are_kept(run_dir: RunDir, uninterrupted: RunDir) -> None:
    """Running statistics are in checkpoints, in its EMA, in weights and exports, and resume."""
    # A resumed run ends with the bits of an uninterrupted one, running statistics included.
    staging.assert_same_weights(uninterrupted, run_dir)
    statistics = {
        name: value for name, value in staging.weights(run_dir).items() if "running_" in name
    }
    assert statistics
    assert all(
        value.any() and not torch.equal(value, torch.ones_like(value))
        for value in statistics.values()
    )
    manifest = Manifest.read(list_checkpoints(run_dir.checkpoints("pretrain"))[0][1])
    assert set(statistics) <= set(manifest.shapes)
    assert "ema" in manifest.kinds
    exported = load_file(run_dir.export / "model.safetensors")
    final = staging.weights(run_dir, "finetune")
    for name in statistics:
        assert torch.equal(exported[name], final[name]), name
