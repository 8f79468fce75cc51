"""The shard cache in one process: same images, verified files only, bounded size."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from pipeline.config.schema import AugmentConfig
from pipeline.data import shard_cache
from pipeline.data.dataset import PreparedDataset, Split, open_dataset
from pipeline.data.loader import Batch, EvalLoader, TrainLoader
from pipeline.data.order import WindowedOrder
from pipeline.data.preprocessing import Preprocessing
from pipeline.data.remote_shards import CachedContent
from pipeline.data.shard_cache import RemoteFile, ShardCache
from pipeline.errors import DataError, StageError
from pipeline.files import file_digest
from pipeline.sources import remote
from tests.data.remote_datasets import (
    MEMORY,
    assert_same_images,
    bytes_for,
    bytes_held,
    largest_shard,
    make_in_memory,
    train_shards,
    wait_until,
)


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> PreparedDataset:
    return make_in_memory(tmp_path_factory.mktemp("set"))


@pytest.fixture(autouse=True)
def short_delays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "FIRST_DELAY", 0.001)


@pytest.fixture
def open_cached(tmp_path: Path, local: PreparedDataset) -> Callable[[float], Split]:
    """The remote training split through a cache in tmp_path/cache for this many shards."""

    def open_train(shards: float) -> Split:
        cache = ShardCache(tmp_path / "cache", bytes_for(local, shards))
        return open_dataset(MEMORY, cache=cache).split("train")

    return open_train


Intercept = Callable[[str, bytes], bytes]


def intercept_reads(monkeypatch: pytest.MonkeyPatch, intercept: Intercept) -> None:
    """Pass (path, data) of every read from the memory store through ``intercept``."""
    original = MemoryFileSystem.cat_file

    def cat_file(
        self: MemoryFileSystem, path: str, start: int | None = None, end: int | None = None
    ) -> bytes:
        return intercept(path, bytes(original(self, path, start=start, end=end)))

    monkeypatch.setattr(MemoryFileSystem, "cat_file", cat_file)


def file_of(split: Split, shard: int) -> RemoteFile:
    content = split._contents[shard]
    assert isinstance(content, CachedContent)
    return content.file


@pytest.mark.parametrize("shards", [1.5, 2.5, 100])
def test_images_are_the_same_whatever_the_size_of_the_cache(
    tmp_path: Path, local: PreparedDataset, shards: float
) -> None:
    dataset = open_dataset(MEMORY, "test", ShardCache(tmp_path / "cache", bytes_for(local, shards)))
    assert dataset.classes == local.classes
    for name in ("train", "validation"):
        assert_same_images(dataset.split(name), local.split(name))
    assert dataset.split("train").place(45) == f"{MEMORY}/train-00001.parquet, row 5"
    if shards == 100:
        kept = [path for path in (tmp_path / "cache").iterdir() if not path.name.startswith(".")]
        assert all(file_digest(path) == path.name for path in kept)


def contents(batch: Batch) -> tuple[bytes, list[int], list[int]]:
    return batch.images.numpy().tobytes(), batch.labels.tolist(), batch.samples.tolist()


def test_batches_equal_those_of_the_local_dataset(tmp_path: Path, local: PreparedDataset) -> None:
    dataset = open_dataset(MEMORY, cache=ShardCache(tmp_path / "cache", bytes_for(local, 2.5)))

    def batches(source: PreparedDataset) -> list[tuple[bytes, list[int], list[int]]]:
        train = TrainLoader(
            source.split("train"),
            seed=3,
            image_size=32,
            augment=AugmentConfig(),
            global_batch=24,
            micro_batch=24,
            threads=2,
        )
        evaluation = EvalLoader(
            source.split("validation"), preprocessing=Preprocessing(32), batch=16, threads=2
        )
        with train, evaluation:
            trained = [contents(batch) for batch in islice(train, 12)]
            return trained + [contents(batch) for batch in evaluation]

    assert batches(dataset) == batches(local)


def test_cache_never_exceeds_its_size(
    local: PreparedDataset, tmp_path: Path, open_cached: Callable[[float], Split]
) -> None:
    split = open_cached(3.2)
    limit = bytes_for(local, 3.2)
    cache = ShardCache(tmp_path / "cache", limit)
    largest = 0
    done = threading.Event()

    def watch() -> None:
        nonlocal largest
        while not done.wait(0.001):
            largest = max(largest, bytes_held(cache))

    watcher = threading.Thread(target=watch)
    watcher.start()
    expected = [bytes(local.split("train").image(i)) for i in range(240)]
    wanted = np.random.default_rng(1).integers(0, 240, 400).tolist()
    with ThreadPoolExecutor(4) as pool:
        images = list(pool.map(lambda i: bytes(split.image(i)), wanted))
    done.set()
    watcher.join()
    assert images == [expected[i] for i in wanted]
    assert 2 * largest_shard(local) < largest <= limit


def test_least_recently_read_shard_is_deleted_first(
    tmp_path: Path,
    local: PreparedDataset,
    monkeypatch: pytest.MonkeyPatch,
    open_cached: Callable[[float], Split],
) -> None:
    monkeypatch.setattr(shard_cache, "TOUCH_SECONDS", 0.0)
    split = open_cached(3.2)
    for shard in (0, 1, 2, 0, 3):  # shard 1 is the least recently read one when 3 is downloaded
        split.image(40 * shard)
        time.sleep(0.02)
    present = [(tmp_path / "cache" / shard.digest).exists() for shard in train_shards(local)[:4]]
    assert present == [True, False, True, True]


def test_shard_that_is_being_read_is_not_deleted(
    tmp_path: Path,
    local: PreparedDataset,
    monkeypatch: pytest.MonkeyPatch,
    open_cached: Callable[[float], Split],
) -> None:
    monkeypatch.setattr(shard_cache, "MAX_IDLE_POLLS", 3)
    split = open_cached(1.5)
    cache = ShardCache(tmp_path / "cache", bytes_for(local, 1.5))
    reading = cache.open(file_of(split, 0))
    with pytest.raises(
        StageError, match=r"no room for a shard of \d+ bytes.*\n  -> raise the size of the cache"
    ):
        split.image(40)
    assert (tmp_path / "cache" / file_of(split, 0).digest).exists()
    os.close(reading)
    assert bytes(split.image(40)) == bytes(local.split("train").image(40))


def test_announced_shards_are_prefetched(
    tmp_path: Path, local: PreparedDataset, open_cached: Callable[[float], Split]
) -> None:
    local.split("train").ahead([1, 2])  # no effect on a local dataset
    digests = [shard.digest for shard in train_shards(local)]
    open_cached(3.5).ahead([4, 2])
    wait_until(lambda: all((tmp_path / "cache" / digests[i]).exists() for i in (2, 4)))
    assert not (tmp_path / "cache" / digests[0]).exists()


def test_dataset_that_fits_is_prefetched_completely(tmp_path: Path, local: PreparedDataset) -> None:
    digests = [shard.digest for shard in train_shards(local)]
    open_dataset(MEMORY, cache=ShardCache(tmp_path / "all")).split("train")
    wait_until(lambda: all((tmp_path / "all" / digest).exists() for digest in digests))


def test_windowed_epoch_downloads_each_shard_once(
    local: PreparedDataset,
    monkeypatch: pytest.MonkeyPatch,
    open_cached: Callable[[float], Split],
) -> None:
    downloads = Counter[str]()

    def count_downloads(path: str, data: bytes) -> bytes:
        downloads[Path(path).name] += path.endswith(".parquet")
        return data

    intercept_reads(monkeypatch, count_downloads)
    split = open_cached(3.5)
    loader = TrainLoader(
        split,
        seed=5,
        image_size=32,
        augment=AugmentConfig(),
        global_batch=8,
        micro_batch=8,
        threads=2,
        order=WindowedOrder([40] * 6, seed=5, window_shards=1),
        prefetch_bytes=1,
    )
    with loader:
        seen = [sample for batch in islice(loader, 30) for sample in batch.samples.tolist()]
        labels = [int(split.labels[sample]) for sample in seen]
    assert sorted(seen) == list(range(240))
    assert labels == [local.split("train").label(sample) for sample in seen]
    # Shards of the next epoch are prefetched at the end of this one: some are downloaded twice.
    assert all(1 <= downloads[f"train-{shard:05d}.parquet"] <= 2 for shard in range(6))
    assert downloads.total() <= 9


def flip_bits_of_shard_2(monkeypatch: pytest.MonkeyPatch, times: int) -> Counter[str]:
    """Damage the first ``times`` reads of shard 2; returns a counter of damaged reads."""
    damaged = Counter[str]()

    def flip_one_bit(path: str, data: bytes) -> bytes:
        changed = bytearray(data)
        if path.endswith("train-00002.parquet") and damaged["reads"] < times:
            damaged["reads"] += 1
            changed[len(changed) // 2] ^= 1
        return bytes(changed)

    intercept_reads(monkeypatch, flip_one_bit)
    return damaged


def test_shard_with_a_wrong_digest_is_downloaded_again(
    local: PreparedDataset,
    monkeypatch: pytest.MonkeyPatch,
    open_cached: Callable[[float], Split],
) -> None:
    damaged = flip_bits_of_shard_2(monkeypatch, times=1)
    assert bytes(open_cached(3.5).image(85)) == bytes(local.split("train").image(85))
    assert damaged["reads"] == 1


def test_shard_with_a_wrong_digest_each_time_is_named(
    tmp_path: Path,
    local: PreparedDataset,
    monkeypatch: pytest.MonkeyPatch,
    open_cached: Callable[[float], Split],
) -> None:
    monkeypatch.setenv("PIPELINE_COMMAND", "./launch.sh")
    damaged = flip_bits_of_shard_2(monkeypatch, times=1000)
    split = open_cached(3.5)
    with pytest.raises(
        DataError,
        match=r"memory:///cached/train-00002.parquet: checksum mismatch: its digest is \w{32}, ",
    ) as raised:
        split.image(85)
    assert raised.value.remedy.endswith("./launch.sh verify PATH")
    assert not [path for path in (tmp_path / "cache").iterdir() if path.suffix == ".tmp"]
    assert bytes(split.image(5)) == bytes(local.split("train").image(5))
    assert damaged["reads"] == 3


def test_command_named_in_the_remedy_of_a_wrong_digest_exists() -> None:
    help_of_verify = [sys.executable, "-m", "pipeline", "verify", "--help"]
    done = subprocess.run(help_of_verify, capture_output=True, text=True, check=True)
    assert "verify" in done.stdout


def test_truncated_file_in_the_cache_is_downloaded_again(
    tmp_path: Path, local: PreparedDataset, open_cached: Callable[[float], Split]
) -> None:
    split = open_cached(3.5)
    split.image(0)
    os.truncate(tmp_path / "cache" / train_shards(local)[0].digest, 100)
    assert bytes(split.image(39)) == bytes(local.split("train").image(39))


def test_unusable_cache_directory_is_an_error(tmp_path: Path, local: PreparedDataset) -> None:
    with pytest.raises(
        StageError, match=r"no room for a shard of \d+ bytes: the cache may hold 1000"
    ):
        open_dataset(MEMORY, cache=ShardCache(tmp_path / "tiny", 1000)).split("train")
    (tmp_path / "file").write_text("")
    with pytest.raises(StageError, match="file/cache: cannot be written: Not a directory"):
        ShardCache(tmp_path / "file" / "cache")


def test_store_that_does_not_answer_is_not_a_fault_of_the_data(
    monkeypatch: pytest.MonkeyPatch, open_cached: Callable[[float], Split]
) -> None:
    split = open_cached(1.5)
    original = MemoryFileSystem.cat_file

    def throttled(self: MemoryFileSystem, path: str, **span: Any) -> bytes:
        if path.endswith(".parquet"):
            raise TimeoutError("slow down")
        return bytes(original(self, path, **span))

    monkeypatch.setattr(MemoryFileSystem, "cat_file", throttled)
    # Not a DataError: no other image may replace one that the network holds back.
    with pytest.raises(
        StageError, match=r"train-00000.parquet: could not be read in 8 attempts: slow down"
    ):
        split.image(0)
