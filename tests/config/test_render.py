"""Text for the user: the dry run, and the explanation of a key."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.config import render
from pipeline.config.load import LoadedJob, load_job
from pipeline.config.schema_text import describe
from pipeline.errors import ConfigError
from tests.config.jobs import JOB, ROOT, write


@pytest.fixture
def quickstart() -> LoadedJob:
    return load_job(ROOT / "jobs/quickstart.yaml", ["stages.pretrain.base_lr=1e-4"])


def lines(text: str) -> dict[str, str]:
    """The lines of a dry run by their first two words."""
    return {" ".join(line.split()[:2]): line for line in text.splitlines()}


def test_dry_run_shows_values_origins_and_plan(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    text = render.dry_run(load_job(write(tmp_path, JOB), ["seed=5"]), world_size=4)
    by_words = lines(text)
    assert by_words["name: small"].split("  # ")[1] == "job.yaml:1"
    assert by_words["seed: 5"].split("  # ")[1] == "--set"
    assert by_words["epochs: 3"].split("  # ")[1] == "job.yaml:10"
    columns_origin = by_words["columns: 4"].split("  # ")[1]
    assert columns_origin.endswith("configs/model/revcol_quickstart.yaml:5")
    assert by_words["log_every_steps: 10"].split("  # ")[1] == "default"
    plan = text[text.index("# Plan") :]
    assert "prepare   toy (/images)" in plan
    assert "pretrain  toy, from scratch, 64 pixels, 3 epochs; 4 processes on " in plan
    assert "global batch 64 = 4 x 16 x 1 (processes x micro batch x accumulation)" in plan
    assert "finetune  toy, from pretrain, 64 pixels" in plan
    assert "# Notes" not in plan


def test_dry_run_counts_steps_if_the_number_of_images_is_known(
    tmp_path: Path, quickstart: LoadedJob
) -> None:
    # 4 epochs of 32 classes x 64 images, 64 images per step.
    assert "4 epochs, about 128 steps" in render.dry_run(quickstart)
    loaded = load_job(write(tmp_path, JOB))
    assert "3 epochs, about 45 steps" in render.dry_run(loaded, images={"toy": 1000})


def test_job_file_reads_back_as_the_same_job(tmp_path: Path, quickstart: LoadedJob) -> None:
    assert load_job(write(tmp_path, render.job_file(quickstart))).job == quickstart.job


def test_explain_shows_meaning_default_and_values_of_a_job(quickstart: LoadedJob) -> None:
    text = render.explain("base_lr")
    assert text.splitlines()[0] == "stages.pretrain.base_lr"
    for part in (
        "Peak learning rate",
        "a number above 0",
        "none: required",
        "also     stages.finetune.base_lr",
    ):
        assert part in text
    text = render.explain("base_lr", quickstart)
    assert "stages.pretrain.base_lr = 0.0001  (--set)" in text
    assert "stages.finetune.base_lr = 0.004  (" in text
    assert "configs/recipe/quickstart_finetune.yaml:7)" in text
    text = render.explain("stages.finetune.image_size", quickstart)
    assert text.startswith("stages.finetune.image_size\n")
    assert "unit     pixels" in text
    assert "default  224" in text


def test_explain_accepts_datasets_with_and_without_a_name(quickstart: LoadedJob) -> None:
    for key in ("data.root", "root"):
        text = render.explain(key, quickstart)
        assert "data.toy22k.root" in text
        assert "data.toy1k.root" in text
    text = render.explain("data.toy1k.synthetic.classes", quickstart)
    assert "data.toy1k.synthetic.classes = 16" in text
    assert "toy22k" not in text
    assert "not in the job quickstart" in render.explain("data.nothing.synthetic.seed", quickstart)


def test_explain_of_a_section_lists_its_keys(quickstart: LoadedJob) -> None:
    text = render.explain("model", quickstart)
    assert "channels" in text
    assert "Number of columns T." in text


@pytest.mark.parametrize(
    ("key", "remedy"),
    [
        ("stages.pretrain.epoch", "did you mean 'stages.pretrain.epochs'?"),
        ("epoch", "did you mean 'epochs'?"),
        ("zzzz", "sections: name, seed"),
        ("", "sections:"),
    ],
)
def test_explain_of_an_unknown_key_suggests_the_closest_one(key: str, remedy: str) -> None:
    with pytest.raises(ConfigError) as error:
        render.explain(key)
    assert f"there is no key '{key}'" in error.value.message
    assert remedy in error.value.message


def test_every_key_has_a_description_and_can_be_explained(quickstart: LoadedJob) -> None:
    keys = [key for key in describe.all_keys() if key.path[-1] != describe.ANY]
    assert len(keys) > 100
    for key in keys:
        assert key.description, key.dotted
        text = render.explain(key.dotted, quickstart)
        assert text.startswith(key.dotted)
        if key.keys:
            assert all(f"    {name}" in text for name in key.keys)
        else:
            assert f"  type     {key.expectation}\n" in text
