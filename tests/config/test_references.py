"""References to files (C6) and to environment variables (C9)."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.config import render
from pipeline.config.load import load_job
from pipeline.errors import ConfigError
from tests.config.jobs import JOB, edited, error_message, write


def test_configs_beside_the_job_come_before_the_shipped_ones(tmp_path: Path) -> None:
    write(tmp_path, "base: revcol_tiny\ncolumns: 6\n", "configs/model/revcol_mine.yaml")
    write(
        tmp_path,
        "base: quickstart_pretrain\nepochs: 2\naugment: {mixup: 0.1}\n",
        "configs/recipe/mine.yaml",
    )
    write(tmp_path, "b\na\n", "configs/classes/ab.txt")
    text = edited(
        *("revcol_quickstart", "revcol_mine"),
        *("recipe: quickstart_pretrain\n    epochs: 3", "recipe: mine"),
        *("layout:", "classes: ab, layout:"),
    )
    loaded = load_job(write(tmp_path, text))
    assert (loaded.job.model.columns, loaded.job.model.channels[0]) == (6, 64)
    assert loaded.job.stages.pretrain is not None
    assert (loaded.job.stages.pretrain.epochs, loaded.job.stages.pretrain.augment.mixup) == (2, 0.1)
    assert loaded.job.stages.pretrain.augment.crop_scale == (0.6, 1.0)
    assert loaded.job.data["toy"].classes == str(tmp_path / "configs/classes/ab.txt")
    elsewhere = write(tmp_path, render.job_file(loaded), "elsewhere/run.yaml")
    assert load_job(elsewhere).job == loaded.job


def test_reference_may_be_a_path(tmp_path: Path) -> None:
    write(tmp_path, "base: revcol_tiny\n", "models/mine.yaml")
    assert load_job(write(tmp_path, JOB), ["model=models/mine.yaml"]).job.model.channels[0] == 64


def test_c6_missing_file_suggests_the_closest_one(tmp_path: Path) -> None:
    message = error_message(tmp_path, edited("model: revcol_quickstart", "model: revcol_quikstart"))
    assert (
        message == "job.yaml:2: model: there is no file configs/model/revcol_quikstart.yaml"
        "\n  -> did you mean 'revcol_quickstart'?"
    )
    message = error_message(
        tmp_path, edited("recipe: quickstart_pretrain", "recipe: nothing_like_it")
    )
    assert message.startswith(
        "job.yaml:9: stages.pretrain.recipe: there is no file configs/recipe/nothing_like_it.yaml"
        "\n  -> "
    )
    message = error_message(tmp_path, edited("layout: class_tars", "classes: imagenet1"))
    assert (
        message == "job.yaml:5: data.toy.classes: no class list 'imagenet1'"
        "\n  -> did you mean 'imagenet1k'?"
    )
    message = error_message(
        tmp_path,
        edited(
            "recipe: quickstart_pretrain", "recipe: quickstart_pretrain\n    from: gone.safetensors"
        ),
    )
    assert "job.yaml:10: stages.pretrain.from: there is no file" in message
    write(tmp_path, JOB, "mine.yaml")
    with pytest.raises(
        ConfigError,
        match=r"mien\.yaml: cannot be read: No such file or directory"
        r"\n  -> did you mean 'mine\.yaml'\?",
    ):
        load_job(tmp_path / "mien.yaml")


def test_c6_files_that_include_each_other_are_refused(tmp_path: Path) -> None:
    write(tmp_path, "base: b\n", "configs/model/a.yaml")
    write(tmp_path, "columns: 4\nbase: a\n", "configs/model/b.yaml")
    message = error_message(tmp_path, edited("model: revcol_quickstart", "model: a"))
    loop = "configs/model/a.yaml -> configs/model/b.yaml -> configs/model/a.yaml"
    assert message == (
        f"configs/model/b.yaml:2: model: the files include each other: {loop}"
        "\n  -> remove one `base`"
    )


def test_c9_all_unset_variables_are_reported_in_one_message(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("NOT_SET", raising=False)
    monkeypatch.delenv("NOR_THIS", raising=False)
    text = edited(
        'root: "/images"', 'root: "${NOT_SET}/images"', "epochs: 3", "epochs: ${NOR_THIS}"
    )
    message = error_message(tmp_path, text)
    assert message.startswith("2 problems:\n")
    assert (
        "job.yaml:5: data.toy.root: the environment variable NOT_SET is not set"
        "\n  -> export NOT_SET=..., or add --set data.toy.root=VALUE" in message
    )
    assert (
        "job.yaml:10: stages.pretrain.epochs: the environment variable NOR_THIS is not set"
        in message
    )
    monkeypatch.setenv("NOT_SET", "/somewhere")
    monkeypatch.setenv("NOR_THIS", "5")
    job = load_job(write(tmp_path, text)).job
    assert job.data["toy"].root == "/somewhere/images"
    assert job.stages.pretrain is not None
    assert job.stages.pretrain.epochs == 5


@pytest.mark.parametrize("written", ["${}", "${A B}", "${A:-${B}}", "${A", "${1}"])
def test_c9_malformed_substitution_is_refused(tmp_path: Path, written: str) -> None:
    message = error_message(tmp_path, edited('root: "/images"', f'root: "{written}"'))
    assert "job.yaml:5: data.toy.root: '${" in message
    assert "is not a substitution\n  -> write ${NAME} or ${NAME:-default}" in message


def test_c9_unquoted_variable_suggests_quotes(tmp_path: Path) -> None:
    message = error_message(tmp_path, edited('root: "/images"', "root: ${HOME}"))
    assert message.startswith("job.yaml:5: not readable as YAML")
    assert message.endswith('-> put the value in quotes ("${NAME}"), or on a line of its own')
