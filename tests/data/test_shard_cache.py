"""Remote shards through a node's cache: the same images, whole and checked files only, bounded, fetched once."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path

import fsspec
import numpy as np
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from pipeline.config.schema import AugmentConfig
from pipeline.data import shard_cache as caching
from pipeline.data.dataset import PreparedDataset, Split, open_dataset
from pipeline.data.loader import EvalLoader, TrainLoader
from pipeline.data.order import WindowedOrder
from pipeline.data.shard_cache import ShardCache
from pipeline.errors import DataError, StageError
from pipeline.files import file_digest
from pipeline.sources import remote
from tests.data.small_datasets import make_dataset
from tests.storage import Proxy, environment, s3_server, upload

MEMORY = "memory:///cached"


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> PreparedDataset:
    """Six shards of 40 images and three of 20, here and in memory://cached."""
    dataset = make_dataset(
        tmp_path_factory.mktemp("set"), {"train": 240, "validation": 50}, shard_rows=40
    )
    store = fsspec.filesystem("memory")
    for path in dataset.path.iterdir():
        store.pipe_file(f"/cached/{path.name}", path.read_bytes())
    return dataset


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "FIRST_DELAY", 0.001)


def shard_sizes(dataset: PreparedDataset) -> list[int]:
    return [shard["bytes"] for shard in dataset.description["splits"]["train"]["shards"]]


def small(dataset: PreparedDataset, shards: float) -> int:
    """Bytes for so many shards and all indexes."""
    return int(shards * max(shard_sizes(dataset))) + sum(
        path.stat().st_size for path in dataset.path.glob("*.idx")
    )


def held(cache: ShardCache) -> int:
    with cache._locked("room"):
        return sum(entry.stat().st_size for entry in os.scandir(cache.directory))


def eventually(condition: Callable[[], bool]) -> None:
    for _ in range(1000):
        if condition():
            return
        time.sleep(0.01)
    raise AssertionError("it did not come about")


def assert_same(remote_split: Split, split: Split) -> None:
    assert len(remote_split) == len(split)
    np.testing.assert_array_equal(remote_split.labels, split.labels)
    for i in np.random.default_rng(0).permutation(len(split)).tolist():
        assert bytes(remote_split.image(i)) == bytes(split.image(i))


@pytest.mark.parametrize("shards", [1.5, 2.5, 100])
def test_every_image_is_the_same_whatever_the_bound(
    tmp_path: Path, local: PreparedDataset, shards: float
) -> None:
    dataset = open_dataset(MEMORY, "test", ShardCache(tmp_path / "cache", small(local, shards)))
    assert dataset.classes == local.classes
    for name in ("train", "validation"):
        assert_same(dataset.split(name), local.split(name))
    assert dataset.split("train").place(45) == f"{MEMORY}/train-00001.parquet, row 5"
    if shards == 100:
        kept = [path for path in (tmp_path / "cache").iterdir() if not path.name.startswith(".")]
        assert all(file_digest(path) == path.name for path in kept)


def test_batches_are_those_of_the_local_dataset(tmp_path: Path, local: PreparedDataset) -> None:
    dataset = open_dataset(MEMORY, cache=ShardCache(tmp_path / "cache", small(local, 2.5)))

    def batches(source: PreparedDataset) -> list[tuple[bytes, list[int], list[int]]]:
        settings = {
            "seed": 3,
            "image_size": 32,
            "global_batch": 24,
            "micro_batch": 24,
            "threads": 2,
        }
        with TrainLoader(source.split("train"), augment=AugmentConfig(), **settings) as loader:  # type: ignore[arg-type]
            train = [
                (b.images.numpy().tobytes(), b.labels.tolist(), b.samples.tolist())
                for b in islice(loader, 12)
            ]
        with EvalLoader(
            source.split("validation"), image_size=32, resize=1.1, batch=16, threads=2
        ) as passes:
            return train + [
                (b.images.numpy().tobytes(), b.labels.tolist(), b.samples.tolist()) for b in passes
            ]

    assert batches(dataset) == batches(local)


def test_the_bound_holds_at_every_moment(tmp_path: Path, local: PreparedDataset) -> None:
    bound, most, done = small(local, 3.2), 0, threading.Event()
    cache = ShardCache(tmp_path / "cache", bound)
    split = open_dataset(MEMORY, cache=cache).split("train")

    def watch() -> None:
        nonlocal most
        while not done.wait(0.001):
            most = max(most, held(cache))

    watcher = threading.Thread(target=watch)
    watcher.start()
    expected = [bytes(local.split("train").image(i)) for i in range(240)]
    wanted = np.random.default_rng(1).integers(0, 240, 400).tolist()
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda i: bytes(split.image(i)), wanted))
    done.set()
    watcher.join()
    assert found == [expected[i] for i in wanted]
    assert 2 * max(shard_sizes(local)) < most <= bound


def test_the_least_recently_read_goes_first(
    tmp_path: Path, local: PreparedDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(caching, "TOUCH", 0.0)
    split = open_dataset(MEMORY, cache=ShardCache(tmp_path / "cache", small(local, 3.2))).split(
        "train"
    )
    digests = [shard["digest"] for shard in local.description["splits"]["train"]["shards"]]
    for shard in (0, 1, 2, 0, 3):  # 1 has waited longest when 3 comes
        split.image(40 * shard)
        time.sleep(0.02)
    assert [(tmp_path / "cache" / digest).exists() for digest in digests[:4]] == [
        True,
        False,
        True,
        True,
    ]


def test_what_is_being_read_stays(
    tmp_path: Path, local: PreparedDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(caching, "PATIENCE", 3)
    cache = ShardCache(tmp_path / "cache", small(local, 1.5))
    split = open_dataset(MEMORY, cache=cache).split("train")
    reading = cache.open(split._maps[0].file)  # type: ignore[attr-defined]
    with pytest.raises(
        StageError, match=r"no room for a shard of \d+ bytes.*\n  -> let the cache be larger"
    ):
        split.image(40)
    assert (tmp_path / "cache" / split._maps[0].file.digest).exists()  # type: ignore[attr-defined]
    os.close(reading)
    assert bytes(split.image(40)) == bytes(local.split("train").image(40))


def test_shards_come_ahead_of_need(tmp_path: Path, local: PreparedDataset) -> None:
    local.split("train").ahead([1, 2])
    shards = [shard["digest"] for shard in local.description["splits"]["train"]["shards"]]
    split = open_dataset(MEMORY, cache=ShardCache(tmp_path / "few", small(local, 3.5))).split(
        "train"
    )
    split.ahead([4, 2])
    eventually(lambda: all((tmp_path / "few" / shards[i]).exists() for i in (2, 4)))
    assert not (tmp_path / "few" / shards[0]).exists()
    open_dataset(MEMORY, cache=ShardCache(tmp_path / "all")).split("train")
    eventually(lambda: all((tmp_path / "all" / digest).exists() for digest in shards))


def test_in_windows_an_epoch_fetches_each_shard_once(
    tmp_path: Path, local: PreparedDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, fetched = MemoryFileSystem.cat_file, Counter[str]()

    def cat_file(
        self: MemoryFileSystem, path: str, start: int | None = None, end: int | None = None
    ) -> bytes:
        fetched[Path(path).name] += path.endswith(".parquet")
        return bytes(whole(self, path, start=start, end=end))

    monkeypatch.setattr(MemoryFileSystem, "cat_file", cat_file)
    split = open_dataset(MEMORY, cache=ShardCache(tmp_path / "cache", small(local, 3.5))).split(
        "train"
    )
    order = WindowedOrder([40] * 6, seed=5, window_shards=1)
    settings = {
        "seed": 5,
        "image_size": 32,
        "global_batch": 8,
        "micro_batch": 8,
        "threads": 2,
        "prefetch_bytes": 1,
    }
    with TrainLoader(split, augment=AugmentConfig(), order=order, **settings) as loader:  # type: ignore[arg-type]
        seen = [sample for batch in islice(loader, 30) for sample in batch.samples.tolist()]
        labels = [int(split.labels[sample]) for sample in seen]
    assert sorted(seen) == list(range(240))
    assert labels == [local.split("train").label(sample) for sample in seen]
    assert all(
        1 <= fetched[f"train-{shard:05d}.parquet"] <= 2 for shard in range(6)
    )  # the next epoch's are fetched ahead
    assert fetched.total() <= 9


@pytest.mark.parametrize("times", [1, 1000])
def test_a_wrong_digest_is_fetched_again_then_named(
    tmp_path: Path, local: PreparedDataset, monkeypatch: pytest.MonkeyPatch, times: int
) -> None:
    whole, spoilt = MemoryFileSystem.cat_file, 0

    def cat_file(
        self: MemoryFileSystem, path: str, start: int | None = None, end: int | None = None
    ) -> bytes:
        nonlocal spoilt
        data = bytearray(whole(self, path, start=start, end=end))
        if path.endswith("train-00002.parquet") and spoilt < times:
            spoilt += 1
            data[len(data) // 2] ^= 1
        return bytes(data)

    monkeypatch.setattr(MemoryFileSystem, "cat_file", cat_file)
    split = open_dataset(MEMORY, cache=ShardCache(tmp_path / "cache", small(local, 3.5))).split(
        "train"
    )
    if times == 1:
        assert bytes(split.image(85)) == bytes(local.split("train").image(85))
    else:
        with pytest.raises(
            DataError,
            match=r"memory:///cached/train-00002.parquet: is not what was written: its digest",
        ):
            split.image(85)
        assert not [path for path in (tmp_path / "cache").iterdir() if path.suffix == ".tmp"]
        assert bytes(split.image(5)) == bytes(local.split("train").image(5))
    assert spoilt == min(times, 3)


def test_a_shard_that_the_disk_has_lost_a_part_of_is_fetched_again(
    tmp_path: Path, local: PreparedDataset
) -> None:
    split = open_dataset(MEMORY, cache=ShardCache(tmp_path / "cache", small(local, 3.5))).split(
        "train"
    )
    split.image(0)
    path = tmp_path / "cache" / local.description["splits"]["train"]["shards"][0]["digest"]
    os.truncate(path, 100)
    assert bytes(split.image(39)) == bytes(local.split("train").image(39))


def test_what_cannot_be_is_said(
    tmp_path: Path, local: PreparedDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(DataError, match="memory:///cached: is remote, and there is no cache"):
        open_dataset(MEMORY)
    with pytest.raises(DataError, match="memory:///nothing: no prepared dataset here"):
        open_dataset("memory://nothing", cache=ShardCache(tmp_path / "cache"))
    with pytest.raises(
        StageError, match=r"no room for a shard of \d+ bytes: the cache may hold 1000"
    ):
        open_dataset(MEMORY, cache=ShardCache(tmp_path / "tiny", 1000)).split("train")
    (tmp_path / "file").write_text("")
    with pytest.raises(StageError, match="file/cache: cannot be written: Not a directory"):
        ShardCache(tmp_path / "file" / "cache")
    split = open_dataset(MEMORY, cache=ShardCache(tmp_path / "cache", small(local, 1.5))).split(
        "train"
    )
    whole = MemoryFileSystem.cat_file

    def throttled(self: MemoryFileSystem, path: str, **span: int) -> bytes:
        if path.endswith(".parquet"):
            raise TimeoutError("slow down")
        return bytes(whole(self, path, **span))

    monkeypatch.setattr(MemoryFileSystem, "cat_file", throttled)
    with pytest.raises(
        StageError, match=r"train-00000.parquet: could not be read in 8 attempts: slow down"
    ):
        split.image(
            0
        )  # no DataError: no other image may stand in for one that the network keeps back


READ_ALL = """
import sys
from pathlib import Path
from pipeline.data.shard_cache import ShardCache
from pipeline.data.dataset import open_dataset
from pipeline.files import digest

cache = ShardCache(Path(sys.argv[2]), int(sys.argv[3]))
split = open_dataset(sys.argv[1], cache=cache).split("train")
print(digest(b"".join(bytes(split.image(i)) for i in range(len(split)))))
"""


@pytest.fixture
def proxy(local: PreparedDataset) -> Iterator[Proxy]:
    with s3_server() as address:
        upload(*address, local.path, "bucket", acl="public-read")
        proxy = Proxy(*address)
        yield proxy
        proxy.close()


def start(proxy: Proxy, cache: Path, bound: int = 1 << 30) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", READ_ALL, "s3://bucket", str(cache), str(bound)],
        env=os.environ | environment(proxy.url),
        stdout=subprocess.PIPE,
        text=True,
    )


def everything(local: PreparedDataset) -> str:
    from pipeline.files import digest

    split = local.split("train")
    return digest(b"".join(bytes(split.image(i)) for i in range(len(split))))


def test_a_dataset_behind_http(tmp_path: Path, local: PreparedDataset, proxy: Proxy) -> None:
    proxy.share, proxy.seed = 0.3, 2
    dataset = open_dataset(f"{proxy.url}/bucket", cache=ShardCache(tmp_path / "cache"))
    assert_same(dataset.split("train"), local.split("train"))
    assert proxy.faults.total() > 0
    with pytest.raises(DataError, match=r"http://.*/nothing: no prepared dataset here"):
        open_dataset(f"{proxy.url}/bucket/nothing", cache=ShardCache(tmp_path / "cache"))
    proxy.always = "refused"
    with pytest.raises(DataError, match=r"http://.*/dataset.json: access is refused"):
        open_dataset(f"{proxy.url}/bucket", cache=ShardCache(tmp_path / "cache"))


def test_two_processes_fetch_a_shard_once(
    tmp_path: Path, local: PreparedDataset, proxy: Proxy
) -> None:
    readers = [start(proxy, tmp_path / "cache") for _ in range(2)]
    assert [reader.communicate(timeout=60)[0].strip() for reader in readers] == [
        everything(local)
    ] * 2
    fetched = {
        path: count
        for (method, path, _), count in proxy.seen.items()
        if method == "GET" and "train-" in path
    }
    assert len(fetched) == 12
    assert set(fetched.values()) == {1}


def test_two_processes_share_a_cache_too_small_for_the_dataset(
    tmp_path: Path, local: PreparedDataset, proxy: Proxy
) -> None:
    readers = [start(proxy, tmp_path / "cache", small(local, 1.5)) for _ in range(2)]
    assert [reader.communicate(timeout=60)[0].strip() for reader in readers] == [
        everything(local)
    ] * 2
    assert held(ShardCache(tmp_path / "cache")) <= small(local, 1.5)


def test_killed_while_fetching_leaves_nothing_half_written(
    tmp_path: Path, local: PreparedDataset, proxy: Proxy
) -> None:
    folder, cut_short = tmp_path / "cache", local.description["splits"]["train"]["shards"][3]
    proxy.held = cut_short["file"]
    reader = start(proxy, folder, small(local, 1.5))
    eventually(lambda: (folder / f"{cut_short['digest']}.tmp").exists())
    reader.send_signal(signal.SIGKILL)
    reader.communicate()
    proxy.held = ""
    proxy.go.set()
    kept = [
        path for path in folder.iterdir() if not path.name.startswith(".") and path.suffix != ".tmp"
    ]
    assert all(file_digest(path) == path.name for path in kept)
    again = start(proxy, folder, small(local, 1.5))
    assert again.communicate(timeout=60)[0].strip() == everything(local)
    assert not list(folder.glob("*.tmp"))
