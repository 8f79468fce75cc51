"""Errors of keys and values (C1, C3, C4): place, key, expectation and remedy."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.config import job_queries
from pipeline.config.load import load_job
from tests.config.jobs import JOB, edited, error_message, load_and_check, write

EPOCHS = "stages.pretrain.epochs: expected a whole number above 0 or 'auto', given"


def test_the_small_job_is_valid(tmp_path: Path) -> None:
    loaded = load_and_check(write(tmp_path, JOB))
    assert job_queries.stage_names(loaded.job) == [
        "prepare",
        "pretrain",
        "finetune",
        "evaluate",
        "export",
    ]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            ("name: small", "naem: small\nname: small"),
            "job.yaml:1: unknown key 'naem'\n  -> did you mean 'name'?",
        ),
        (
            ("epochs: 3", "epoch: 3"),
            "job.yaml:10: unknown key 'epoch' in stages.pretrain\n  -> did you mean 'epochs'?",
        ),
        (
            ("{from: finetune}\n  export", "{frm: finetune}\n  export"),
            "job.yaml:12: unknown key 'frm' in stages.evaluate\n  -> did you mean 'from'?",
        ),
        (
            ("epochs: 3", "augment: {mixpu: 0}"),
            "job.yaml:10: unknown key 'mixpu' in stages.pretrain.augment"
            "\n  -> did you mean 'mixup'?",
        ),
        (
            ("layout:", "layuot:"),
            "job.yaml:5: unknown key 'layuot' in data.toy\n  -> did you mean 'layout'?",
        ),
        (
            ("cluster: local", "columns: 4"),
            "job.yaml:3: unknown key 'columns'\n  -> it belongs to model.columns",
        ),
        (
            ("recipe: quickstart_pretrain", "base: quickstart_pretrain"),
            "job.yaml:9: unknown key 'base' in stages.pretrain\n  -> did you mean 'recipe'?",
        ),
        (
            ("epochs: 3", "xyzzy: 3"),
            "job.yaml:10: unknown key 'xyzzy' in stages.pretrain\n  -> keys here: augment, ",
        ),
    ],
)
def test_c1_unknown_key_suggests_the_closest_one(
    tmp_path: Path, change: tuple[str, str], message: str
) -> None:
    assert message in error_message(tmp_path, edited(*change))


def test_c1_typo_in_a_dataset_without_a_name_is_reported(tmp_path: Path) -> None:
    text = JOB.replace(
        '\n  toy: {root: "/images", layout: class_tars}', " {rot: /images, layuot: class_tars}"
    )
    message = error_message(tmp_path, text)
    assert "job.yaml:4: unknown key 'rot' in data.images\n  -> did you mean 'root'?" in message
    assert "job.yaml:4: unknown key 'layuot' in data.images\n  -> did you mean 'layout'?" in message


def test_c1_typo_in_a_referenced_file_names_that_file(tmp_path: Path) -> None:
    write(tmp_path, "# mine\ncolums: 8\n", "configs/model/mine.yaml")
    message = error_message(tmp_path, edited("model: revcol_quickstart", "model: mine"))
    assert (
        "configs/model/mine.yaml:2: unknown key 'colums' in model\n  -> did you mean 'columns'?"
        in message
    )


@pytest.mark.parametrize("written", ["1e-4", "1.e-4", "1E-4", "0.0001", "100e-6"])
def test_c3_bare_exponents_are_numbers(tmp_path: Path, written: str) -> None:
    in_file = load_job(write(tmp_path, edited("epochs: 3", f"base_lr: {written}"))).job
    on_line = load_job(write(tmp_path, JOB), [f"stages.pretrain.base_lr={written}"]).job
    for job in (in_file, on_line):
        assert job.stages.pretrain is not None
        assert job.stages.pretrain.base_lr == pytest.approx(1e-4, rel=1e-12)


@pytest.mark.parametrize(
    ("written", "message"),
    [
        (
            'epochs: "3"',
            f'{EPOCHS} "3"\n  -> take the quotes away: 3',
        ),
        (
            "epochs: 3.5",
            f"{EPOCHS} 3.5\n  -> Passes over",
        ),
        (
            "epochs: 3.0",
            f"{EPOCHS} 3.0\n  -> write 3",
        ),
        ("epochs: -1", f"{EPOCHS} -1"),
        ("epochs:", f"{EPOCHS} null"),
        (
            "base_lr: fast",
            'stages.pretrain.base_lr: expected a number above 0, given "fast"'
            "\n  -> Peak learning rate",
        ),
        ("base_lr: .nan", "stages.pretrain.base_lr: expected a number above 0, given NaN"),
        (
            "precision: bf61",
            "stages.pretrain.precision: expected one of 'bf16', 'fp16', 'fp32', given \"bf61\""
            "\n  -> did you mean 'bf16'?",
        ),
        (
            "zero_stage: 4",
            "stages.pretrain.zero_stage: expected a whole number from 0 to 3, given 4",
        ),
        (
            "intermediate_supervision: yes",
            'stages.pretrain.intermediate_supervision: expected true or false, given "yes"',
        ),
        (
            "betas: [0.9]",
            "stages.pretrain.betas: expected a list of 2 values, each a number, 0 or more "
            "and below 1, given [0.9]",
        ),
        ("augment: strong", 'stages.pretrain.augment: expected a mapping, given "strong"'),
        (
            "drop_path: 1.0",
            "stages.pretrain.drop_path: expected a number, 0 or more and below 1 or null, given "
            "1.0",
        ),
    ],
)
def test_c4_value_of_a_wrong_type_is_refused(tmp_path: Path, written: str, message: str) -> None:
    assert f"job.yaml:10: {message}" in error_message(tmp_path, edited("epochs: 3", written))


def test_c4_text_that_looks_like_a_number_needs_quotes(tmp_path: Path) -> None:
    message = error_message(tmp_path, edited("name: small", "name: 2024"))
    assert (
        message == "job.yaml:1: name: expected text of 1 to 64 characters, given 2024"
        "\n  -> put it in quotes"
    )


@pytest.mark.parametrize("name", ["a/b", "../up", ".hidden", "a\\b", '"a\\nb"', "x" * 65])
def test_job_name_must_be_a_folder_name(tmp_path: Path, name: str) -> None:
    assert "job.yaml:1: name: expected text of 1 to 64 characters" in error_message(
        tmp_path, edited("name: small", f"name: {name}")
    )


def test_dataset_name_must_be_a_folder_name(tmp_path: Path) -> None:
    message = error_message(tmp_path, edited("  toy:", '  "../toy":'))
    assert "job.yaml:5" in message
    assert "'../toy' cannot be the name of a dataset" in message


def test_missing_required_keys_are_reported(tmp_path: Path) -> None:
    message = error_message(tmp_path, edited("    recipe: quickstart_pretrain\n", ""))
    assert message.startswith(
        "job.yaml:8: stages.pretrain.base_lr is missing: expected a number above 0"
        "\n  -> write it, or name a recipe"
    )
    message = error_message(tmp_path, "name: small\nmodel: revcol_tiny\n")
    assert message.count("is missing") == 2
    assert "data is missing" in message
    assert "stages is missing" in message


def test_all_problems_are_reported_in_one_message(tmp_path: Path) -> None:
    text = edited(
        *("name: small", "nmae: small"),
        *("epochs: 3", "epochs: many\n    base_lr: 0"),
        *("layout: class_tars", "min_side: 1.5"),
    )
    message = error_message(tmp_path, text)
    assert message.startswith("5 problems:\njob.yaml:1: unknown key 'nmae'")
    for part in (
        "name is missing",
        "job.yaml:10: stages.pretrain.epochs",
        "job.yaml:11: stages.pretrain.base_lr",
        "job.yaml:5: data.toy.min_side",
    ):
        assert part in message
    message = error_message(
        tmp_path,
        JOB,
        "stages.pretrain.image_size=100",
        "stages.finetune.global_batch=31",
        "stages.evaluate.from=pretrian",
    )
    assert message.startswith("3 problems:\n")
