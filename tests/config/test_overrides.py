"""``--set``: values, errors, and the property that the resolved job is a job file of itself."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline.config import render
from pipeline.config.load import load_job
from pipeline.config.schema_text import describe
from tests.config.jobs import JOB, edited, error_message, write

UNNAMED = JOB.replace('\n  toy: {root: "/images", layout: class_tars}', " {root: /images}")


@pytest.fixture
def job(tmp_path: Path) -> Path:
    return write(tmp_path, JOB)


def at(values: Any, dotted: str) -> Any:
    for key in dotted.split("."):
        values = values[key]
    return values


@pytest.mark.parametrize(
    ("override", "key", "value"),
    [
        ("seed=7", "seed", 7),
        (" seed = 7", "seed", 7),
        ("name=a=b", "name", "a=b"),
        ("name=2024", "name", "2024"),
        ("name=true", "name", "true"),
        ('name="quoted name"', "name", "quoted name"),
        ("name=café ☕", "name", "café ☕"),
        ("data.toy.root=/with: colon #and hash", "data.toy.root", "/with: colon #and hash"),
        ("data.toy.root=/[brackets", "data.toy.root", "/[brackets"),
        ("data.root=s3://bucket/x", "data.toy.root", "s3://bucket/x"),
        ("data.toy.synthetic.classes=5", "data.toy.synthetic.classes", 5),
        ("model=revcol_tiny", "model.channels", [64, 128, 256, 512]),
        ("model.base=revcol_tiny", "model.columns", 4),
        ("model.channels=[8, 16, 32, 64]", "model.channels", [8, 16, 32, 64]),
        ("model={base: revcol_base, columns: 5}", "model.columns", 5),
        ("stages.pretrain.base_lr=1e-4", "stages.pretrain.base_lr", 1e-4),
        ("stages.pretrain.recipe=pretrain_1k", "stages.pretrain.warmup_epochs", 20),
        ("stages.pretrain.betas=[0.8, 0.9]", "stages.pretrain.betas", [0.8, 0.9]),
        ("stages.pretrain.augment.mixup=0", "stages.pretrain.augment.mixup", 0),
        ("stages.prepare.data=[toy]", "stages.prepare.data", ["toy"]),
        ("cluster.processes=4", "cluster.processes", 4),
    ],
)
def test_set_changes_the_value(job: Path, override: str, key: str, value: Any) -> None:
    loaded = load_job(job, [override])
    assert at(loaded.resolved(), key) == value
    if "{" not in override and override.split("=")[0].strip() == key:
        assert loaded.origins[key] == "--set"


def test_set_below_a_reference_keeps_its_other_values(job: Path) -> None:
    loaded = load_job(job, ["model.drop_path=0.3", "stages.pretrain.augment.mixup=0.1"])
    assert loaded.job.model.channels == (16, 32, 64, 128)
    assert loaded.origins["model.drop_path"] == "--set"
    assert loaded.origins["model.channels"].endswith("configs/model/revcol_quickstart.yaml:3")
    assert at(loaded.resolved(), "stages.pretrain.augment.crop_scale") == [0.6, 1.0]


def test_later_set_wins_and_null_removes_a_stage(job: Path) -> None:
    loaded = load_job(
        job,
        [
            "seed=1",
            "seed=2",
            "stages.finetune=null",
            "stages.evaluate.from=pretrain",
            "stages.export.from=pretrain",
        ],
    )
    assert loaded.job.seed == 2
    assert "finetune" not in loaded.resolved()["stages"]
    assert loaded.notes == [
        "--set: stages.finetune is empty and will not run; write finetune: {} for its defaults"
    ]


def test_variables_in_set_are_replaced(job: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WHERE", "/data")
    monkeypatch.setenv("EMPTY", "")
    overrides = ["data.root=${WHERE}/${EMPTY:-x}/${UNSET_ONE:-y z}", "seed=${SEED_UNSET:-11}"]
    loaded = load_job(job, overrides)
    assert loaded.job.data["toy"].root == "/data/x/y z"
    assert loaded.job.seed == 11


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "seed",
            "--set: 'seed' is not KEY=VALUE\n  -> for example --set stages.pretrain.epochs=10",
        ),
        ("=1", "is not KEY=VALUE"),
        ("stages..lr=1", "is not KEY=VALUE"),
        ("modle=x", "--set: 'modle=x': there is no key 'modle'\n  -> did you mean 'model'?"),
        (
            "stages.pretrian.base_lr=1",
            "there is no key 'pretrian' in stages\n  -> did you mean 'pretrain'?",
        ),
        (
            "stages.pretrain.base_lrr=1",
            "there is no key 'base_lrr' in stages.pretrain\n  -> did you mean 'base_lr'?",
        ),
        ("data.rot=/x", "there is no key 'rot' in data.toy\n  -> did you mean 'root'?"),
        ("data.toy.rot=/x", "there is no key 'rot' in data.toy\n  -> did you mean 'root'?"),
        (
            "stages.pretrain.betas.0=1",
            "-> stages.pretrain.betas is a list of 2 values, each a number, 0 or more "
            "and below 1: set it as a whole",
        ),
        (
            "seed.x=1",
            "there is no key 'x' in seed"
            "\n  -> seed is a whole number, 0 or more and below 4294967296: set it as a whole",
        ),
        ("seed=[1", "--set: 'seed=[1': not readable as YAML"),
        ("seed=!!python/name:os.system 1", "the YAML tag '!!python/name:os.system' is not allowed"),
        (
            "seed=",
            "--set: seed: expected a whole number, 0 or more and below 4294967296, given null",
        ),
        (
            "stages.pretrain.base_lr=fast",
            '--set: stages.pretrain.base_lr: expected a number above 0, given "fast"',
        ),
        (
            "model=revcol_tny",
            "--set: model: there is no file configs/model/revcol_tny.yaml"
            "\n  -> did you mean 'revcol_tiny'?",
        ),
        (
            "cluster=nope",
            "--set: cluster: there is no file configs/cluster/nope.yaml"
            "\n  -> files in configs/cluster: compose, kubernetes, local, ray, slurm",
        ),
        (
            "data.toy.layout=class_tar",
            "--set: data.toy.layout: expected one of 'class_folders', 'class_tars', 'huggingface', "
            "'imagenet_tars', 'webdataset', 'auto', given \"class_tar\"\n  -> did you mean "
            "'class_tars'?",
        ),
    ],
)
def test_impossible_set_is_refused_with_a_remedy(
    tmp_path: Path, override: str, message: str
) -> None:
    assert message in error_message(tmp_path, JOB, override)


def test_set_without_a_dataset_name_lists_the_choices(tmp_path: Path) -> None:
    text = edited("data:\n", "data:\n  extra: {root: /extra}\n")
    message = error_message(tmp_path, text, "data.root=/x")
    assert (
        message == "--set: 'data.root=/x': the job has 2 datasets"
        "\n  -> choose one: data.extra.root, data.toy.root"
    )


def test_dataset_without_a_name_is_called_images(tmp_path: Path) -> None:
    path = write(tmp_path, UNNAMED)
    assert list(load_job(path).job.data) == ["images"]
    for override in ("data.root=/other", "data.images.root=/other"):
        assert load_job(path, [override]).job.data["images"].root == "/other"
    by_name = load_job(path, ["data=imagenet1k", "data.root=/in1k"]).job.data["images"]
    assert (by_name.layout, by_name.root) == ("imagenet_tars", "/in1k")


def test_paths_of_sources_and_weights_become_absolute(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    job = load_job(
        write(tmp_path, JOB), ["data.root=images", "stages.pretrain.from=w.safetensors"]
    ).job
    assert job.data["toy"].root == str(tmp_path / "images")
    assert job.stages.pretrain is not None
    assert job.stages.pretrain.initial == str(tmp_path / "w.safetensors")
    hub = load_job(tmp_path / "job.yaml", ["data.root=user/dataset", "data.layout=huggingface"]).job
    assert hub.data["toy"].root == "user/dataset"


def values(schema: dict[str, Any]) -> st.SearchStrategy[Any]:
    """Values that a key may have by its JSON Schema."""
    if "anyOf" in schema:
        return st.one_of([values(branch) for branch in schema["anyOf"]])
    if "const" in schema or "enum" in schema:
        return st.sampled_from(schema.get("enum", [schema.get("const")]))
    kind = schema.get("type")
    if kind in ("integer", "number"):
        low = schema.get("minimum", schema.get("exclusiveMinimum", 0))
        high = schema.get("maximum", schema.get("exclusiveMaximum", 1e6))
        without_low = "exclusiveMinimum" in schema
        without_high = "exclusiveMaximum" in schema
        if kind == "integer":
            return st.integers(low + without_low, int(high) - without_high)
        return st.floats(low, high, exclude_min=without_low, exclude_max=without_high, width=32)
    if kind == "array" and "prefixItems" not in schema:
        items = schema["items"]
        if items.get("type") != "string":  # sections; each has keys that must be written
            return st.just([])
        if "enum" in items:
            return st.lists(values(items), max_size=2, unique=True)
        texts = ["name", "other-name"] if "pattern" in items else ["--a=b", "module load cuda"]
        return st.lists(st.sampled_from(texts), max_size=2)
    if kind == "array":
        return st.tuples(*map(values, schema["prefixItems"])).map(list)
    if kind == "object":
        return st.just({})
    if kind == "boolean":
        return st.booleans()
    return st.none()


FREE_TEXT = st.text(
    st.characters(exclude_categories=["Cs"], exclude_characters="\0$'\""), max_size=20
).map(str.strip)
NAMES = st.from_regex(
    r"[^./\\\x00-\x1f\ud800-\udfff$\s'\"][^/\\\x00-\x1f\ud800-\udfff$\s]{0,20}", fullmatch=True
)
TEXTS = {
    "cluster.slurm.time": st.sampled_from(["00:10:00", "2-00:00:00"]),
    "name": NAMES,
    "data.toy.image_column": FREE_TEXT,
    "data.toy.root": FREE_TEXT.map(lambda text: "/x" + text.replace("://", "")),
}


def settable() -> list[tuple[str, st.SearchStrategy[Any]]]:
    keys: list[tuple[str, st.SearchStrategy[Any]]] = []
    for key in describe.all_keys():
        dotted = key.dotted.replace(describe.ANY, "toy")
        if dotted in TEXTS:
            keys.append((dotted, TEXTS[dotted]))
        elif (
            not key.keys
            and not key.section
            and key.expectation != "text"
            and not dotted.endswith((".data", "device"))
            # Sections that are absent, and cannot be written one key at a time.
            and not dotted.startswith(("cluster.shard_cache.", "cluster.kubernetes.claims."))
        ):
            keys.append((dotted, values(key.schema)))
    return keys


SETTABLE = settable()
OVERRIDES = st.lists(
    st.sampled_from(SETTABLE).flatmap(lambda pair: st.tuples(st.just(pair[0]), pair[1])), max_size=8
)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(OVERRIDES)
def test_resolved_job_of_any_valid_overrides_gives_the_same_job(
    tmp_path_factory: pytest.TempPathFactory, overrides: list[tuple[str, Any]]
) -> None:
    folder = tmp_path_factory.getbasetemp()
    texts = [
        f"{key}={value if isinstance(value, str) else json.dumps(value)}"
        for key, value in overrides
    ]
    loaded = load_job(write(folder, JOB, "before.yaml"), texts)
    for key, value in dict(overrides).items():
        assert at(loaded.resolved(), key) == (
            os.path.abspath(value) if key.endswith(".root") else value
        )
        assert loaded.origins[key] == "--set"
    again = load_job(write(folder, render.job_file(loaded), "after.yaml"))
    assert again.job == loaded.job
    assert again.notes == []


def test_the_property_covers_more_than_a_hundred_keys() -> None:
    assert len(SETTABLE) > 100
