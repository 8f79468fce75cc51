"""Words of other tools lead to the key that is meant; keys that are 'auto' say how."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.config import auto_values, render
from pipeline.config.schema_text import describe, synonyms
from pipeline.config.schema_text.auto_text import HOW_CHOSEN
from pipeline.errors import ConfigError
from tests.config.jobs import JOB, edited, error_message


@pytest.mark.parametrize(
    ("word", "remedy"),
    [
        ("learning_rate", "did you mean 'base_lr'?"),
        ("stages.pretrain.learning_rate", "did you mean 'base_lr'?"),
        ("gpus", "did you mean 'cluster.processes'?"),
        ("val_fraction", "did you mean 'data.validation_fraction'?"),
        ("data.val-split", "did you mean 'data.validation_fraction'?"),
        ("batch_size", "did you mean 'global_batch'?"),
        ("num_workers", "did you mean 'cluster.loader_threads'?"),
        ("label_smoothing", "did you mean 'smoothing'?"),
    ],
)
def test_explain_suggests_the_key_that_a_word_means(word: str, remedy: str) -> None:
    with pytest.raises(ConfigError) as error:
        render.explain(word)
    assert error.value.remedy == remedy


def test_a_word_for_several_keys_suggests_all_of_them() -> None:
    with pytest.raises(ConfigError, match=r"did you mean .*'weight_decay'\?") as error:
        render.explain("optim")
    assert "'optimizer' or" in error.value.remedy


@pytest.mark.parametrize(
    ("override", "remedy"),
    [
        ("gpus=2", "did you mean 'cluster.processes'?"),
        (
            "learning_rate=1",
            "did you mean 'stages.pretrain.base_lr' or 'stages.finetune.base_lr'?",
        ),
        ("stages.pretrain.learning_rate=1", "did you mean 'base_lr'?"),
        ("data.val_fraction=0.2", "did you mean 'validation_fraction'?"),
        ("stages.pretrain.image_size=atuo", "did you mean 'auto'?"),
        ("stages.pretrain.root=DIR", "it belongs to data.root"),
    ],
)
def test_an_override_with_the_word_of_another_tool_names_the_key(
    tmp_path: Path, override: str, remedy: str
) -> None:
    assert remedy in error_message(tmp_path, JOB, override)


def test_a_job_file_with_the_word_of_another_tool_names_the_key(tmp_path: Path) -> None:
    message = error_message(tmp_path, edited("epochs: 3", "epochs: 3\n    batch_size: 64"))
    assert (
        "unknown key 'batch_size' in stages.pretrain\n  -> did you mean 'global_batch'?" in message
    )


def test_a_word_that_is_a_key_elsewhere_still_means_the_key_of_its_section(
    tmp_path: Path,
) -> None:
    message = error_message(tmp_path, edited("layout: class_tars", "path: /images"))
    assert "unknown key 'path' in data.toy\n  -> did you mean 'root'?" in message


def test_every_key_of_the_table_exists_and_no_word_is_itself_a_key() -> None:
    names = {key.path[-1] for key in describe.all_keys()}
    assert not set(synonyms.NAMES_ELSEWHERE) - names
    words = {word for entry in synonyms.NAMES_ELSEWHERE.values() for word in entry.split()}
    # The words of Kubernetes' own section are Kubernetes': `path` of a claim, but `root` of images.
    ours = {key.path[-1] for key in describe.all_keys() if "kubernetes" not in key.path}
    assert not words & ours


@pytest.mark.parametrize("key", [*auto_values.KEYS, "model.stem_stride", "validation_fraction"])
def test_explain_says_how_auto_is_chosen(key: str) -> None:
    shown = render.explain(key)
    assert "or 'auto'" in shown
    how_chosen = HOW_CHOSEN[key.rpartition(".")[2]]
    assert f"  auto     {how_chosen}" in shown


def test_every_key_that_accepts_auto_says_how_it_is_chosen() -> None:
    silent = [
        key.dotted
        for key in describe.all_keys()
        if "'auto'" in key.expectation
        and not (key.how_chosen or "'auto':" in key.description or " auto:" in key.description)
    ]
    assert not silent


def test_an_image_size_of_the_evaluation_is_never_auto(tmp_path: Path) -> None:
    assert "or 'auto'" not in render.explain("stages.evaluate.image_size")
    assert "given" in error_message(tmp_path, JOB, "stages.evaluate.image_size=auto")
