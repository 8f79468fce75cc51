"""Data that was prepared before: what contradicts it is refused, and it needs no preparation."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.config import job_queries
from pipeline.config.load import load_job
from pipeline.data.dataset import PreparedDataset
from pipeline.data.job_dataset import open_job_dataset, require_cache_room
from pipeline.errors import ConfigError, DataError
from pipeline.layout import RunDir
from tests.config.jobs import JOB, edited, error_message, load_and_check, write
from tests.data.remote_datasets import MEMORY, make_in_memory
from tests.data.small_datasets import make_dataset

URL = "s3://bucket/toy"
SOURCE = 'toy: {root: "/images", layout: class_tars}'


def prepared(place: str, text: str = JOB) -> str:
    return edited(SOURCE, f'toy: {{prepared: "{place}"}}', text=text)


def with_cache(gib: float, folder: Path) -> list[str]:
    return [f"cluster.shard_cache={{local_folder: {folder}, max_gib: {gib:.9f}}}"]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> PreparedDataset:
    return make_dataset(tmp_path_factory.mktemp("set"), {"train": 240, "validation": 50})


def test_a_prepared_folder_is_used_in_place_and_nothing_is_prepared(
    dataset: PreparedDataset, tmp_path: Path
) -> None:
    job = load_and_check(write(tmp_path, prepared(str(dataset.path)))).job
    assert job_queries.prepared_names(job) == []
    run_dir = RunDir(tmp_path / "run")
    for stage in ("pretrain", "evaluate", "export"):
        assert open_job_dataset(job, run_dir, stage).fingerprint == dataset.fingerprint


def test_a_folder_without_a_dataset_is_refused_here_and_not_for_a_cluster(tmp_path: Path) -> None:
    text = prepared("/absent/toy")
    assert error_message(tmp_path, text) == (
        "job.yaml:5: data.toy.prepared: /absent/toy holds no prepared dataset (dataset.json is "
        "missing)\n  -> correct the path"
    )
    cluster = "cluster: {kind: slurm, device: cpu, nodes: 2}"
    load_and_check(write(tmp_path, edited("cluster: local", cluster, text=text)))


def test_a_source_beside_it_is_refused(dataset: PreparedDataset, tmp_path: Path) -> None:
    path = write(tmp_path, prepared(str(dataset.path)))
    with pytest.raises(ConfigError, match=r"data\.toy\.root: the dataset is prepared already"):
        load_and_check(path, ["data.toy.root=/images"])
    with pytest.raises(ConfigError, match=r"stages\.prepare\.data: 'toy' is prepared already"):
        load_and_check(path, ["stages.prepare.data=[toy]"])


def test_a_url_needs_a_cache(tmp_path: Path) -> None:
    assert error_message(tmp_path, prepared(URL)) == (
        "job.yaml:5: data.toy.prepared: a dataset behind a URL needs a cache\n"
        "  -> cluster.shard_cache: {local_folder: FOLDER, max_gib: SIZE}"
    )


def test_a_rehearsal_needs_neither_the_dataset_nor_a_cache(tmp_path: Path) -> None:
    job = load_job(write(tmp_path, prepared(URL)), rehearse=True).job
    assert job.data["toy"].prepared == ""
    assert job_queries.prepared_names(job) == ["toy"]


@pytest.mark.parametrize(
    ("settings", "share", "refused"),
    [
        (["order=global"], 1.1, ""),
        (["order=global"], 0.9, "stages.pretrain.order"),
        (["order=windowed", "window_shards=1"], 0.9, ""),
        (["order=windowed", "window_shards=3"], 0.6, "stages.pretrain.window_shards"),
    ],
)
def test_a_cache_that_is_too_small_for_the_order_is_refused(
    settings: list[str], share: float, refused: str, tmp_path: Path
) -> None:
    stored = make_in_memory(tmp_path / "set")
    files = [path for path in stored.path.iterdir() if path.suffix in (".parquet", ".idx")]
    size = sum(path.stat().st_size for path in files)
    overrides = [
        f"stages.{stage}.{text}" for text in settings for stage in ("pretrain", "finetune")
    ]
    overrides += with_cache(share * size / 2**30, tmp_path / "cache")
    job = load_job(write(tmp_path, prepared(MEMORY)), overrides).job
    run_dir = RunDir(tmp_path / "run")
    if not refused:
        require_cache_room(job, run_dir)
        assert open_job_dataset(job, run_dir, "pretrain").fingerprint == stored.fingerprint
        return
    with pytest.raises(ConfigError) as caught:
        require_cache_room(job, run_dir)
    assert caught.value.place == refused
    assert "cluster.shard_cache.max_gib: " in caught.value.remedy


def test_a_url_without_a_dataset_is_named(tmp_path: Path) -> None:
    path = write(tmp_path, prepared("memory:///absent"))
    job = load_job(path, with_cache(1, tmp_path / "cache")).job
    with pytest.raises(DataError, match="memory:///absent: no prepared dataset here"):
        require_cache_room(job, RunDir(tmp_path / "run"))
