"""Every shipped job loads, resolves and can work, at several world sizes, real and rehearsed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from pipeline.config import job_queries, machine, render
from pipeline.config.check import check
from pipeline.config.job_queries import TRAINING
from pipeline.config.load import LoadedJob, load_job
from pipeline.config.schema import Job
from pipeline.config.schema_text.json_schema import json_schema
from pipeline.config.yaml_tree.reading import read_mapping
from pipeline.errors import ConfigError
from pipeline.shipped import CONFIGS
from pipeline.sources.class_lists import class_list, class_names
from tests.config.jobs import ROOT, SHIPPED, write
from tests.prepare.source_folders import class_tars

VARIABLES = ("IMAGENET22K", "IMAGENET1K", "CIFAR10", "OWN_IMAGES")
WORLD_SIZES = (1, 2, 8, 64)
PUBLISHED = [path for path in SHIPPED if "revcol" in path.stem]
by_name = pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)


@pytest.fixture(scope="session")
def own_images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return class_tars(tmp_path_factory.mktemp("own"), classes=10, count=30, validation=2)


@pytest.fixture
def environment(own_images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:
        monkeypatch.setenv(name, str(own_images))


def real(path: Path, world_size: int) -> LoadedJob:
    loaded = load_job(path, [f"cluster.processes={world_size}"])
    check(loaded.job, world_size, loaded.origins)
    return loaded


def training(job: Job) -> list[str]:
    return [stage for stage in job_queries.stage_names(job) if stage in TRAINING]


def test_there_are_the_shipped_jobs() -> None:
    wanted = {"quickstart", "cifar10", "own_images", "pretrain_revcol_h"}
    wanted |= {
        "revcol_tiny_1k",
        "revcol_small_1k",
        "revcol_base_1k",
        "revcol_base_22k",
        "revcol_large_22k",
        "revcol_xlarge_22k",
    }
    assert {path.stem for path in SHIPPED} == wanted


@pytest.mark.usefixtures("environment")
@pytest.mark.parametrize("world_size", WORLD_SIZES)
@by_name
def test_at_every_world_size(path: Path, world_size: int) -> None:
    if (
        path.stem == "quickstart" and world_size == 64
    ):  # two cores' batch of 32 has no 64 shares: told, with what would do
        with pytest.raises(
            ConfigError, match="32 images cannot be shared evenly by 64 processes\n  -> take 64"
        ):
            real(path, world_size)
        return
    job = real(path, world_size).job
    for stage in training(job):
        micro, accumulation = job_queries.batches(job_queries.train_config(job, stage), world_size)
        assert (
            world_size * micro * accumulation == job_queries.train_config(job, stage).global_batch
        )
    assert job_queries.stage_names(job)[0] == "prepare"
    assert job_queries.stage_names(job)[-2:] == ["evaluate", "export"]
    assert render.dry_run(real(path, world_size), world_size=world_size).count("\n") > 60


@by_name
def test_rehearsal_needs_nothing(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    loaded = load_job(path, rehearse=True)
    job = loaded.job
    check(job, machine.world_size(job.cluster), loaded.origins)
    assert job.name.endswith("-rehearsal")
    assert machine.world_size(job.cluster) == 2
    assert job.model.channels[0] <= 12
    assert all(dataset.synthetic is not None and not dataset.root for dataset in job.data.values())
    for stage in training(job):
        config = job_queries.train_config(job, stage)
        assert config.max_steps == 8
        assert job_queries.batches(config, 2) == (4, 2)
        assert loaded.origins[f"stages.{stage}.global_batch"] == "rehearse"
    assert "synthetic" in render.dry_run(loaded)


@pytest.mark.usefixtures("environment")
@pytest.mark.parametrize("path", PUBLISHED, ids=lambda path: path.stem)
def test_a_rehearsal_changes_sizes_alone(path: Path) -> None:
    large, small = load_job(path).job, load_job(path, rehearse=True).job
    assert job_queries.stage_names(small) == job_queries.stage_names(large)
    kept = {"depths", "columns", "huge", "activations", "drop_path"}
    assert small.model.model_dump(include=kept) == large.model.model_dump(include=kept)
    assert {name: data.classes for name, data in small.data.items()} == {
        name: data.classes for name, data in large.data.items()
    }
    for stage in training(large):
        kept = {
            "precision",
            "zero_stage",
            "supervision",
            "lr",
            "base_lr_batch",
            "layer_decay",
            "ema",
            "augment",
            "clip_grad",
            "initial",
        }
        small_stage, large_stage = (
            job_queries.train_config(small, stage),
            job_queries.train_config(large, stage),
        )
        assert small_stage.model_dump(include=kept) == large_stage.model_dump(include=kept)
    if large.stages.finetune is not None:
        assert small.stages.pretrain is not None
        assert small.stages.finetune is not None
        assert small.stages.finetune.image_size > small.stages.pretrain.image_size


def test_the_published_h_pipeline(environment: None) -> None:
    job = load_job(ROOT / "jobs/pretrain_revcol_h.yaml").job
    assert job.model.huge
    assert job.stages.pretrain is not None
    assert job.stages.finetune is not None
    assert (
        job.stages.pretrain.image_size,
        job.stages.pretrain.epochs,
        job.stages.pretrain.zero_stage,
    ) == (224, 90, 3)
    assert (
        job.stages.finetune.image_size,
        job.stages.finetune.epochs,
        job.stages.finetune.initial,
    ) == (640, 20, "pretrain")
    assert [len(class_list(data.classes)) for data in job.data.values()] == [21841, 1000]
    assert job_queries.evaluate_image_size(job) == 640


def test_a_rehearsal_tells_what_cannot_work_in_the_real_job(
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
    assert "'pretrian' is neither a training stage nor a .safetensors file" in message


def test_weights_of_the_real_width_are_left_out_of_a_rehearsal() -> None:
    overrides = ["stages.pretrain.from=elsewhere.safetensors"]
    loaded = load_job(ROOT / "jobs/revcol_tiny_1k.yaml", overrides, rehearse=True)
    assert loaded.job.stages.pretrain is not None
    assert loaded.job.stages.pretrain.initial == ""
    assert any("stages.pretrain.from" in note for note in loaded.notes)


def test_cifar_by_its_variable_or_its_default_or_set(monkeypatch: pytest.MonkeyPatch) -> None:
    path = ROOT / "jobs/cifar10.yaml"
    monkeypatch.delenv("CIFAR10", raising=False)
    assert load_job(path).job.data["images"].root.endswith("shared/data/cifar10")
    monkeypatch.setenv("CIFAR10", "/from/environment")
    assert load_job(path).job.data["images"].root == "/from/environment"
    assert load_job(path, ["data.root=/set"]).job.data["images"].root == "/set"


@by_name
def test_the_json_schema_takes_it(path: Path) -> None:
    schema = json.loads(json.dumps(json_schema()))
    jsonschema.Draft202012Validator.check_schema(schema)
    jsonschema.Draft202012Validator(schema).validate(read_mapping(path).data())


def test_the_json_schema_takes_a_resolved_job_and_refuses_mistakes(environment: None) -> None:
    validator = jsonschema.Draft202012Validator(json_schema())
    for path in SHIPPED:
        validator.validate(load_job(path).resolved())
    good = read_mapping(ROOT / "jobs/quickstart.yaml").data()
    mistakes: list[dict[str, Any]] = [
        {"nmae": "x"},
        {"seed": "x"},
        {"model": {"columns": 3}},
        {"data": {"bad name": {}}},
        {"data": {"x": {"rot": ""}}},
        {"stages": {"pretrain": {"lrr": 1}}},
        {"stages": {"pretrain": {"epochs": "many"}}},
    ]
    for mistake in mistakes:
        with pytest.raises(jsonschema.ValidationError):
            validator.validate(good | mistake)


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
def test_every_file_in_configs_loads(kind: str, key: str) -> None:
    job = "own_images" if kind == "recipe" else "quickstart"
    files = sorted((CONFIGS / kind).glob("*.yaml"))
    assert files
    for path in files:
        origins = load_job(ROOT / f"jobs/{job}.yaml", [f"{key}={path.stem}"]).origins
        assert any(f"configs/{kind}/{path.name}:" in origin for origin in origins.values())


def test_class_lists() -> None:
    sizes = {"imagenet1k": 1000, "fall11_21841": 21841, "google_21843": 21843}
    for name, size in sizes.items():
        assert len(class_list(name)) == size
        assert set(class_list(name)) <= set(class_names())
    assert class_names()["n01440764"].startswith("tench")


def test_class_lists_of_ones_own(tmp_path: Path) -> None:
    assert class_list(str(write(tmp_path, "# order\nb bee\n\na\n", "c.txt"))) == ["b", "a"]
    with pytest.raises(
        ConfigError, match=r"c2\.txt:3: the class b is listed twice \(first in line 1\)"
    ):
        class_list(str(write(tmp_path, "b\na\nb\n", "c2.txt")))
    with pytest.raises(ConfigError, match="names no class"):
        class_list(str(write(tmp_path, "# nothing\n", "c3.txt")))
    with pytest.raises(ConfigError, match="cannot be read as a class list"):
        class_list(str(write(tmp_path, b"\xff\n", "c4.txt")))
