"""``keep: best`` needs images that may choose: refused before anything starts, or rehearsed."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.config.check import check
from pipeline.config.load import LoadedJob, load_job
from pipeline.errors import ConfigError
from tests.config.jobs import JOB, write

KEEP_BEST = "stages.pretrain.keep=best"


def load(folder: Path, *overrides: str, rehearse: bool = False) -> LoadedJob:
    return load_job(write(folder, JOB), [KEEP_BEST, *overrides], rehearse=rehearse)


def refusal(loaded: LoadedJob) -> str:
    with pytest.raises(ConfigError) as caught:
        check(loaded.job, 1, loaded.origins)
    return caught.value.message


@pytest.mark.parametrize(
    "folders",
    [("train", "val"), ("train", "test"), ("cats", "dogs"), ("train", "test", "cats")],
)
def test_a_dataset_without_a_selection_split_is_refused(
    folders: tuple[str, ...], tmp_path: Path
) -> None:
    for folder in folders:
        (tmp_path / "images" / folder).mkdir(parents=True)
    loaded = load(tmp_path, f"data.toy.root={tmp_path / 'images'}")
    assert refusal(loaded) == (
        "--set: stages.pretrain.keep: toy reports the accuracy on its only validation images, so "
        "these cannot choose the best weights\n"
        "  -> data.toy.selection_fraction: 0.1 holds some out, or keep: last"
    )
    # The remedy works.
    check(load(tmp_path, "data.toy.selection_fraction=0.1").job, 1)


def test_a_test_split_lets_the_validation_images_choose(tmp_path: Path) -> None:
    for folder in ("train", "val", "test"):
        (tmp_path / "images" / folder).mkdir(parents=True)
    root = f"data.toy.root={tmp_path / 'images'}"
    check(load(tmp_path, root).job, 1)
    # Without it, they are reported again.
    no_test = "data.toy.splits={train: train, validation: val}"
    assert "stages.pretrain.keep: toy reports" in refusal(load(tmp_path, root, no_test))


def test_synthetic_images_have_no_test_split(tmp_path: Path) -> None:
    loaded = load(tmp_path, "data.toy.synthetic={}")
    assert "stages.pretrain.keep: toy reports" in refusal(loaded)


def test_a_rehearsal_holds_images_out_for_a_job_with_a_test_split(tmp_path: Path) -> None:
    for folder in ("train", "val", "test"):
        (tmp_path / "images" / folder).mkdir(parents=True)
    loaded = load(tmp_path, f"data.toy.root={tmp_path / 'images'}", rehearse=True)
    assert loaded.job.data["toy"].selection_fraction == 0.1
    check(loaded.job, 2)
    last = load_job(write(tmp_path, JOB), [], rehearse=True)
    assert last.job.data["toy"].selection_fraction == 0
