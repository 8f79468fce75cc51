"""Every shipped job and config file loads and is valid, at several world sizes."""

from __future__ import annotations

import itertools
import re
from pathlib import Path

import pytest

from pipeline.config import job_queries, render
from pipeline.config.check import check
from pipeline.config.job_queries import training_stages
from pipeline.config.load import LoadedJob, load_job
from pipeline.errors import ConfigError
from pipeline.shipped import CONFIGS
from pipeline.sources.class_lists import class_list
from tests.config.jobs import ROOT, SHIPPED, each_shipped_job, each_training_job

WORLD_SIZES = (1, 2, 8, 64)


def load_valid(path: Path, world_size: int) -> LoadedJob:
    loaded = load_job(path, [f"cluster.processes={world_size}"])
    check(loaded.job, world_size, loaded.origins)
    return loaded


def test_these_jobs_are_shipped() -> None:
    wanted = {"quickstart", "cifar10", "own_images", "pretrain_revcol_h", "evaluate"}
    wanted |= {
        "revcol_tiny_1k",
        "revcol_small_1k",
        "revcol_base_1k",
        "revcol_base_22k",
        "revcol_large_22k",
        "revcol_xlarge_22k",
    }
    assert {path.stem for path in SHIPPED} == wanted


@each_shipped_job
def test_shipped_job_begins_with_its_purpose_needs_and_duration(path: Path) -> None:
    lines = path.read_text().splitlines()
    comment = "\n".join(itertools.takewhile(lambda line: line.startswith("#"), lines))
    assert comment.startswith("# ")
    assert "Needs " in comment
    assert re.search(r"minutes|hours?\b", comment)


@pytest.mark.usefixtures("environment")
@pytest.mark.parametrize("world_size", WORLD_SIZES)
@each_training_job
def test_shipped_job_is_valid_at_every_world_size(path: Path, world_size: int) -> None:
    # The quickstart fine-tunes with a global batch of 32, which 64 processes cannot share.
    if path.stem == "quickstart" and world_size == 64:
        message = "32 images cannot be shared evenly by 64 processes\n  -> take 64"
        with pytest.raises(ConfigError, match=message):
            load_valid(path, world_size)
        return
    job = load_valid(path, world_size).job
    for stage in training_stages(job):
        train = job_queries.train_config(job, stage)
        micro, accumulation = job_queries.batches(train, world_size)
        assert world_size * micro * accumulation == train.global_batch
    assert job_queries.stage_names(job)[0] == "prepare"
    assert job_queries.stage_names(job)[-2:] == ["evaluate", "export"]
    assert render.dry_run(load_valid(path, world_size), world_size=world_size).count("\n") > 60


def test_revcol_h_has_the_published_stages(environment: None) -> None:
    job = load_job(ROOT / "jobs/pretrain_revcol_h.yaml").job
    assert job.model.huge
    assert job.stages.pretrain is not None
    assert job.stages.finetune is not None
    assert (
        job.stages.pretrain.image_size,
        job.stages.pretrain.epochs,
        job.stages.pretrain.zero_stage,
    ) == (224, 90, 2)
    assert (
        job.stages.finetune.image_size,
        job.stages.finetune.epochs,
        job.stages.finetune.initial,
    ) == (640, 20, "pretrain")
    assert [len(class_list(data.classes)) for data in job.data.values()] == [21841, 1000]
    assert job_queries.evaluate_image_size(job) == 640


def test_cifar_source_is_set_by_override_variable_or_default(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = ROOT / "jobs/cifar10.yaml"
    monkeypatch.delenv("CIFAR10", raising=False)
    assert load_job(path).job.data["images"].root.endswith("shared/data/cifar10")
    monkeypatch.setenv("CIFAR10", "/from/environment")
    assert load_job(path).job.data["images"].root == "/from/environment"
    assert load_job(path, ["data.root=/set"]).job.data["images"].root == "/set"


@pytest.mark.usefixtures("environment")
@pytest.mark.parametrize(
    ("kind", "key"),
    [
        ("model", "model"),
        ("cluster", "cluster"),
        ("data", "data.toy1k"),
        ("recipe", "stages.pretrain.recipe"),
    ],
)
def test_every_shipped_config_file_loads(kind: str, key: str) -> None:
    job = "own_images" if kind == "recipe" else "quickstart"
    files = sorted((CONFIGS / kind).glob("*.yaml"))
    assert files
    for path in files:
        origins = load_job(ROOT / f"jobs/{job}.yaml", [f"{key}={path.stem}"]).origins
        assert any(f"configs/{kind}/{path.name}:" in origin for origin in origins.values())
