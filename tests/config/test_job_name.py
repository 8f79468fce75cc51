"""``{folder}`` in the name of a job: one job file, one run directory per folder of images."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.config.load import load_job
from tests.config.jobs import JOB, ROOT, VARIABLES, edited, write

OWN = ROOT / "jobs/own_images.yaml"


def name_of(folder: Path, *overrides: str, name: str = "mine-{folder}") -> str:
    text = edited("name: small", f'name: "{name}"')
    return load_job(write(folder, text), overrides).job.name


@pytest.mark.parametrize(
    ("root", "expected"),
    [
        ("/data/flowers", "mine-flowers"),
        ("/data/flowers/", "mine-flowers"),
        ("/data/Flowers 2024 (new)", "mine-Flowers_2024_new"),
        ("/data/blümchen", "mine-blümchen"),
        ("/data/.hidden", "mine-hidden"),
        ("s3://bucket/birds", "mine-birds"),
        ("/", "mine"),
        ("/data/" + "x" * 99, "mine-" + "x" * 59),
    ],
)
def test_the_name_of_the_folder_is_filled_in(tmp_path: Path, root: str, expected: str) -> None:
    assert name_of(tmp_path, f"data.root={root}") == expected


def test_a_relative_folder_has_the_name_it_lies_under(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "flowers").mkdir()
    monkeypatch.chdir(tmp_path / "flowers")
    assert name_of(tmp_path, "data.root=.") == "mine-flowers"


def test_several_datasets_give_each_folder_once(tmp_path: Path) -> None:
    text = JOB.replace("name: small", "name: mine-{folder}").replace(
        "  toy:", '  other: {root: "/a/cats"}\n  third: {root: "/b/cats"}\n  toy:'
    )
    text = text.replace("    epochs: 3", "    epochs: 3\n    data: toy")
    text = text.replace("recipe: quickstart_finetune,", "recipe: quickstart_finetune, data: toy,")
    assert load_job(write(tmp_path, text)).job.name == "mine-cats-images"


def test_a_name_without_the_reference_stays(tmp_path: Path) -> None:
    assert name_of(tmp_path, name="{mine}") == "{mine}"
    assert name_of(tmp_path, "name=other") == "other"


def test_a_rehearsal_reads_no_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in VARIABLES:
        monkeypatch.delenv(variable, raising=False)
    assert load_job(OWN, rehearse=True).job.name == "own_images-rehearsal"


@pytest.mark.usefixtures("environment")
def test_runs_of_own_images_are_named_after_the_folder(own_images: Path) -> None:
    assert load_job(OWN).job.name == f"own_images-{own_images.name}"
