"""A job for own images trains from scratch, or fine-tunes the weights that it is given."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from pipeline.config.check import check
from pipeline.config.job_queries import stage_names
from pipeline.config.load import LoadedJob, load_job
from pipeline.errors import ConfigError
from pipeline.export import official
from pipeline.model import build
from tests.checkpoint.published_files import write_published
from tests.config.jobs import ROOT

OWN = ROOT / "jobs" / "own_images.yaml"


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of the size of RevCol-T with few channels, which is a network of its own."""
    model = build([8, 8, 8, 8], [2, 2, 4, 2], 4, 1000, huge=True)
    state = official.to_published(model)
    return write_published(tmp_path_factory.mktemp("weights") / "revcol.pth", state, ema=state)


def load_own(images: Path, *overrides: str) -> LoadedJob:
    loaded = load_job(OWN, [f"data.root={images}", *overrides])
    check(loaded.job, 1, loaded.origins)
    return loaded


def test_without_weights_a_small_network_is_trained_from_scratch(own_images: Path) -> None:
    job = load_own(own_images).job
    assert stage_names(job) == ["prepare", "pretrain", "evaluate", "export"]
    assert job.model.block == "residual"
    assert job.stages.evaluate is not None
    assert job.stages.evaluate.initial == "pretrain"
    assert load_own(own_images, "model=revcol_tiny").job.model.depths == (2, 2, 4, 2)


def test_a_stage_that_names_the_fine_tuning_keeps_it(own_images: Path) -> None:
    job = load_own(own_images, "stages.evaluate.from=finetune", "stages.export.from=pretrain").job
    assert stage_names(job) == ["prepare", "pretrain", "finetune", "evaluate", "export"]


def test_with_weights_their_network_is_fine_tuned(own_images: Path, published: Path) -> None:
    loaded = load_own(own_images, f"stages.finetune.from={published}", "model.drop_path=0.2")
    job = loaded.job
    assert stage_names(job) == ["prepare", "finetune", "evaluate", "export"]
    assert job.model.channels == (8, 8, 8, 8)
    assert job.model.huge
    assert job.model.stem_stride == 4
    assert job.model.drop_path == 0.2
    assert job.stages.finetune is not None
    assert job.stages.finetune.image_size % 32 == 0
    assert job.stages.finetune.layer_decay == 0.9
    assert job.stages.export is not None
    assert job.stages.export.initial == "finetune"
    notes = "\n".join(loaded.notes)
    assert "the weights of 'state_dict_ema' are read from revcol.pth; also there: #model" in notes
    assert "not executed, and not needed: builtins.input" in notes
    assert "stages.pretrain is left out: no stage uses its result" in notes


def test_a_pretraining_that_a_stage_uses_is_kept(published: Path, own_images: Path) -> None:
    job = load_job(
        OWN,
        [
            f"data.root={own_images}",
            f"stages.finetune.from={published}",
            "stages.evaluate.from=pretrain",
        ],
    ).job
    assert "pretrain" in stage_names(job)


def test_a_model_of_the_job_is_compared_with_the_weights(own_images: Path, published: Path) -> None:
    with pytest.raises(ConfigError) as error:
        load_own(own_images, f"stages.finetune.from={published}", "model=revcol_small")
    message = error.value.message
    assert "model.columns: the job has 8, the weights of stages.finetune.from 4" in message
    assert "model.huge: the job has false, the weights of stages.finetune.from true" in message


def test_a_shipped_network_is_named(own_images: Path, tmp_path: Path) -> None:
    with torch.device("meta"):
        shapes = official.to_published(build("revcol_small", num_classes=3))
    # Zeros of one element seen as many: a file of a few kilobytes.
    zeros = {name: torch.zeros(1).expand(value.shape) for name, value in shapes.items()}
    path = write_published(tmp_path / "revcol.pth", zeros)
    with pytest.raises(ConfigError) as error:
        load_own(own_images, f"stages.finetune.from={path}", "model=revcol_tiny")
    assert error.value.message.endswith("\n  -> model: revcol_small")


@pytest.mark.parametrize("content", [b"<html>", b"PK\x03\x04 cut off"])
def test_a_file_without_weights_is_refused_with_its_name(
    content: bytes, own_images: Path, tmp_path: Path
) -> None:
    (tmp_path / "revcol.pth").write_bytes(content)
    with pytest.raises(ConfigError, match=r"revcol\.pth: no weights can be read from it") as error:
        load_own(own_images, f"stages.finetune.from={tmp_path / 'revcol.pth'}")
    assert error.value.exit_code == 2


def test_published_weights_are_evaluated_on_published_pixels(
    own_images: Path, published: Path
) -> None:
    evaluate = ROOT / "jobs" / "evaluate.yaml"
    settings = [f"stages.evaluate.from={published}", f"data.root={own_images}"]
    loaded = load_job(evaluate, settings)
    check(loaded.job, 1, loaded.origins)
    stage = loaded.job.stages.evaluate
    assert stage is not None
    assert stage.preprocessing == "published"
    assert stage.image_size == 224
    assert loaded.origins["stages.evaluate.preprocessing"] == str(published)
