"""Names of earlier releases: an error in a user's file, migrated in the files of an old run."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import NamedTuple

import pytest

from pipeline.command import command
from pipeline.config import render
from pipeline.config.load import load_job
from pipeline.config.resume_diff import changes
from pipeline.config.schema.renamed import RENAMED_KEYS, RENAMED_VALUES
from pipeline.config.schema_text import describe
from pipeline.config.stage_settings import settings_of
from pipeline.config.yaml_tree.old_names import migrate_renamed
from pipeline.errors import ConfigError
from pipeline.layout import RunDir
from pipeline.orchestrate.inspect_target import find
from tests.config.jobs import JOB, edited, error_message, write


class Renamed(NamedTuple):
    """An old key in its section, with a value that the new key accepts."""

    section: str
    old: str
    new: str
    value: str

    @property
    def message(self) -> str:
        return (
            f"'{self.old}' was renamed to '{self.new}'\n  -> write {self.new} instead of {self.old}"
        )


TABLE = [
    Renamed("stages.pretrain", "lr", "base_lr", "0.001"),
    Renamed("stages.pretrain", "lr_batch", "base_lr_batch", "256"),
    Renamed("stages.pretrain", "ema", "ema_decay", "0.9"),
    Renamed("stages.pretrain", "supervision", "intermediate_supervision", "false"),
    Renamed("stages.pretrain", "repeats", "repeated_augmentation", "2"),
    Renamed("stages.pretrain", "log_steps", "log_every_steps", "7"),
    Renamed("stages.pretrain", "checkpoint_steps", "checkpoint_every_steps", "8"),
    Renamed("stages.pretrain", "eval_epochs", "eval_every_epochs", "2.0"),
    Renamed("stages.pretrain", "eval_resize", "preprocessing", "whole"),
    Renamed("stages.pretrain.augment", "erasing", "random_erasing", "0.2"),
    Renamed("stages.pretrain.augment", "cutmix_share", "mixup_switch_prob", "0.3"),
    Renamed("data.toy", "generate", "synthetic", "{seed: 4}"),
    Renamed("data.toy.synthetic", "dirt", "corrupt_fraction", "0.05"),
]
every_key = pytest.mark.parametrize("renamed", TABLE, ids=lambda renamed: renamed.old)

# The small job with a section for every old key; the key is written on a line of its own.
PLACES = {
    "stages.pretrain": ("    epochs: 3\n", "    epochs: 3\n    {entry}\n"),
    "stages.pretrain.augment": ("    epochs: 3\n", "    augment:\n      {entry}\n"),
    "data.toy": ('{root: "/images", layout: class_tars}', "\n    root: /images\n    {entry}"),
    "data.toy.synthetic": (
        '{root: "/images", layout: class_tars}',
        "\n    synthetic:\n      {entry}",
    ),
}


def job_with(renamed: Renamed, key: str) -> tuple[str, int]:
    """A job that has ``key`` in the section, and the number of its line."""
    old, new = PLACES[renamed.section]
    entry = f"{key}: {renamed.value}"
    text = edited(old, new.replace("{entry}", entry))
    return text, text.splitlines().index(
        next(x for x in text.splitlines() if x.strip() == entry)
    ) + 1


def test_the_cases_cover_the_whole_table() -> None:
    assert {renamed.old: renamed.new for renamed in TABLE} == RENAMED_KEYS
    assert set(RENAMED_VALUES) == {"on_mismatch", "preprocessing"}


@every_key
def test_new_name_is_a_key_and_the_old_one_is_not(renamed: Renamed) -> None:
    section = describe.find(renamed.section.split("."))
    assert section is not None
    assert renamed.new in section.keys
    assert renamed.old not in {key.path[-1] for key in describe.all_keys()}


@every_key
def test_old_key_in_a_job_file_is_an_error_with_its_line(tmp_path: Path, renamed: Renamed) -> None:
    text, line = job_with(renamed, renamed.old)
    assert error_message(tmp_path, text) == f"job.yaml:{line}: {renamed.message}"
    load_job(write(tmp_path, job_with(renamed, renamed.new)[0]))


@every_key
def test_old_key_in_a_referenced_file_is_an_error_with_its_line(
    tmp_path: Path, renamed: Renamed
) -> None:
    kind, _, below = renamed.section.partition(".")
    nested = below.split(".")[1:]
    entry = f"{renamed.old}: {renamed.value}"
    content = f"{nested[0]}:\n  {entry}" if nested else entry
    if kind == "data":
        file = "configs/data/mine.yaml"
        text = edited('{root: "/images", layout: class_tars}', "mine")
    else:
        file = "configs/recipe/mine.yaml"
        text = edited("recipe: quickstart_pretrain", "recipe: mine")
    write(tmp_path, f"# of an earlier release\n{content}\n", file)
    line = 3 if nested else 2
    assert error_message(tmp_path, text) == f"{file}:{line}: {renamed.message}"


@every_key
def test_old_key_in_set_is_an_error_with_the_new_override(tmp_path: Path, renamed: Renamed) -> None:
    override = f"{renamed.section}.{renamed.old}={renamed.value}"
    assert error_message(tmp_path, JOB, override) == (
        f"--set: '{override}': '{renamed.old}' was renamed to '{renamed.new}'"
        f"\n  -> --set {renamed.section}.{renamed.new}={renamed.value}"
    )


@every_key
def test_old_key_inside_a_mapping_in_set_is_an_error(tmp_path: Path, renamed: Renamed) -> None:
    override = f"{renamed.section}={{{renamed.old}: {renamed.value}}}"
    assert error_message(tmp_path, JOB, override) == f"--set: {renamed.message}"


@every_key
@pytest.mark.parametrize("full", [False, True], ids=["last part", "full key"])
def test_explain_of_an_old_key_names_the_new_one(renamed: Renamed, full: bool) -> None:
    prefix = f"{renamed.section}." if full else ""
    with pytest.raises(ConfigError) as error:
        render.explain(f"{prefix}{renamed.old}")
    remedy = command("explain", f"{prefix}{renamed.new}")
    assert error.value.message == (
        f"explain: '{renamed.old}' was renamed to '{renamed.new}'\n  -> {remedy}"
    )
    assert render.explain(f"{prefix}{renamed.new}")


@every_key
def test_run_yaml_of_an_old_run_is_migrated(tmp_path: Path, renamed: Renamed) -> None:
    old = load_job(write(tmp_path, job_with(renamed, renamed.old)[0]), migrate=True)
    new = load_job(write(tmp_path, job_with(renamed, renamed.new)[0]))
    assert old.job == new.job


@every_key
def test_stored_settings_of_an_old_run_are_migrated(tmp_path: Path, renamed: Renamed) -> None:
    resolved = load_job(write(tmp_path, job_with(renamed, renamed.new)[0])).resolved()
    assert migrate_renamed(with_old_names(resolved)) == resolved
    assert migrate_renamed(resolved) == resolved


def with_old_names(value: object) -> dict[str, object]:
    """A resolved job as the release before wrote it."""
    text = json.dumps(value)
    for old, new in RENAMED_KEYS.items():
        text = text.replace(f'"{new}":', f'"{old}":')
    result: dict[str, object] = json.loads(text.replace('"retry"', '"redo"'))
    return result


@pytest.mark.parametrize("entrance", ["job file", "recipe", "--set"])
def test_old_value_of_on_mismatch_is_an_error(tmp_path: Path, entrance: str) -> None:
    write(tmp_path, "on_mismatch: redo\nbase_lr: 1.0\n", "configs/recipe/mine.yaml")
    text, overrides, place = {
        "job file": (edited("epochs: 3", "on_mismatch: redo"), [], "job.yaml:10"),
        "recipe": (edited("quickstart_pretrain", "mine"), [], "configs/recipe/mine.yaml:1"),
        "--set": (JOB, ["stages.pretrain.on_mismatch=redo"], "--set"),
    }[entrance]
    assert error_message(tmp_path, text, *overrides) == (
        f"{place}: stages.pretrain.on_mismatch: 'redo' was renamed to 'retry'"
        "\n  -> write on_mismatch: retry"
    )


@pytest.mark.parametrize(("resize", "mode"), [("1.143", "fast"), ("1.0", "whole")])
def test_the_factor_of_an_old_run_becomes_its_preprocessing(
    resize: str, mode: str, tmp_path: Path
) -> None:
    text = edited("epochs: 3", f"eval_resize: {resize}")
    job = load_job(write(tmp_path, text), migrate=True).job
    assert job.stages.pretrain is not None
    assert job.stages.pretrain.preprocessing == mode
    assert f"write preprocessing: {mode}" in error_message(tmp_path, text)


def test_two_old_names_in_one_key_are_reported_together(tmp_path: Path) -> None:
    message = error_message(tmp_path, JOB, "data.generate.dirt=0.1")
    assert message == (
        "--set: 'data.generate.dirt=0.1': 'generate' was renamed to 'synthetic', "
        "'dirt' was renamed to 'corrupt_fraction'"
        "\n  -> --set data.toy.synthetic.corrupt_fraction=0.1"
    )


def test_old_names_of_all_files_are_reported_in_one_message(tmp_path: Path) -> None:
    write(tmp_path, "lr: 1.0\nema: 0.9\nepochs: 2\n", "configs/recipe/mine.yaml")
    text = edited(
        *("recipe: quickstart_pretrain", "recipe: mine"),
        *("epochs: 3", "log_steps: 5"),
        *("recipe: quickstart_finetune", "recipe: mine"),  # the same file twice
        *('{root: "/images", layout: class_tars}', "{generate: {dirt: 0.1}}"),
    )
    message = error_message(tmp_path, text)
    places = re.findall(r"^([^ ]+): '(\w+)' was renamed", message, re.M)
    assert message.startswith("5 problems:\n")
    assert places == [
        ("job.yaml:5", "generate"),
        ("job.yaml:5", "dirt"),
        ("job.yaml:10", "log_steps"),
        ("configs/recipe/mine.yaml:1", "lr"),
        ("configs/recipe/mine.yaml:2", "ema"),
    ]


def test_old_key_in_a_dataset_without_a_name_is_reported(tmp_path: Path) -> None:
    text = JOB.replace('\n  toy: {root: "/images", layout: class_tars}', " {generate: {}}")
    message = error_message(tmp_path, text)
    assert message == (
        "job.yaml:4: 'generate' was renamed to 'synthetic'"
        "\n  -> write synthetic instead of generate"
    )


def test_old_name_in_another_section_is_an_unknown_key(tmp_path: Path) -> None:
    message = error_message(tmp_path, edited("prepare: {}", "prepare: {lr: 1}"))
    assert "job.yaml:7: unknown key 'lr' in stages.prepare" in message


def test_new_name_wins_when_an_old_run_has_both(tmp_path: Path) -> None:
    path = write(tmp_path, edited("epochs: 3", "lr: 0.5\n    base_lr: 0.25"))
    job = load_job(path, migrate=True).job
    assert job.stages.pretrain is not None
    assert job.stages.pretrain.base_lr == 0.25


def test_old_name_in_run_yaml_overrides_the_recipe(tmp_path: Path) -> None:
    # run.yaml has all values and still names its recipe, which sets base_lr under its new name.
    path = write(tmp_path, edited("epochs: 3", "lr: 0.5"))
    job = load_job(path, migrate=True).job
    assert job.stages.pretrain is not None
    assert job.stages.pretrain.base_lr == 0.5


def test_an_old_run_resumes_because_its_settings_are_unchanged(tmp_path: Path) -> None:
    resolved = load_job(write(tmp_path, JOB)).resolved()
    run_dir = RunDir(tmp_path / "run")
    assert settings_of(run_dir, "pretrain") is None
    write(tmp_path, json.dumps(with_old_names(resolved)), "run/stages/pretrain/job.json")
    started_with = settings_of(run_dir, "pretrain")
    assert started_with is not None
    assert changes(started_with, resolved, "pretrain") == []


def test_data_commands_read_an_old_run_but_refuse_an_old_job_file(tmp_path: Path) -> None:
    text = edited("epochs: 3", "epochs: 3\n    lr: 0.5")
    write(tmp_path, text, "runs/small/run.yaml")
    target = find(Path("small"), tmp_path / "runs")
    assert (target.dataset.name, target.stage) == ("toy", "pretrain")
    dataset = write(tmp_path, "{}", "runs/small/stages/prepare/toy/dataset.json").parent
    assert find(dataset, tmp_path / "runs").stage == "pretrain"
    with pytest.raises(ConfigError, match="'lr' was renamed to 'base_lr'"):
        find(write(tmp_path, text), tmp_path / "runs")
