"""A cache shared by several processes, in front of an S3-compatible server with faults."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.data.dataset import PreparedDataset, open_dataset
from pipeline.data.shard_cache import ShardCache
from pipeline.errors import DataError
from pipeline.files import file_digest
from pipeline.sources import remote
from tests.data.remote_datasets import (
    assert_same_images,
    bytes_for,
    bytes_held,
    cached_files,
    digest_of_images,
    train_shards,
    wait_until,
)
from tests.data.small_datasets import make_dataset
from tests.storage import Proxy, environment, s3_server, upload

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


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> PreparedDataset:
    folder = tmp_path_factory.mktemp("set")
    return make_dataset(folder, {"train": 240, "validation": 50}, shard_rows=40)


@pytest.fixture(autouse=True)
def short_delays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "FIRST_DELAY", 0.001)


@pytest.fixture
def proxy(local: PreparedDataset) -> Iterator[Proxy]:
    with s3_server() as address:
        upload(*address, local.path, "bucket", acl="public-read")
        proxy = Proxy(*address)
        yield proxy
        proxy.close()


def start(proxy: Proxy, cache: Path, max_bytes: int = 1 << 30) -> subprocess.Popen[str]:
    """A process that reads all training images and prints their digest."""
    return subprocess.Popen(
        [sys.executable, "-c", READ_ALL, "s3://bucket", str(cache), str(max_bytes)],
        env=os.environ | environment(proxy.url),
        stdout=subprocess.PIPE,
        text=True,
    )


def test_dataset_behind_http_is_read_despite_faults(
    tmp_path: Path, local: PreparedDataset, proxy: Proxy
) -> None:
    proxy.share = 0.3
    proxy.seed = 2
    dataset = open_dataset(f"{proxy.url}/bucket", cache=ShardCache(tmp_path / "cache"))
    assert_same_images(dataset.split("train"), local.split("train"))
    assert proxy.faults.total() > 0
    with pytest.raises(DataError, match=r"http://.*/nothing: no prepared dataset here"):
        open_dataset(f"{proxy.url}/bucket/nothing", cache=ShardCache(tmp_path / "cache"))
    proxy.always = "refused"
    with pytest.raises(DataError, match=r"http://.*/dataset.json: access is refused"):
        open_dataset(f"{proxy.url}/bucket", cache=ShardCache(tmp_path / "cache"))


def test_two_processes_download_each_shard_once(
    tmp_path: Path, local: PreparedDataset, proxy: Proxy
) -> None:
    readers = [start(proxy, tmp_path / "cache") for _ in range(2)]
    digests = [reader.communicate(timeout=60)[0].strip() for reader in readers]
    assert digests == [digest_of_images(local.split("train"))] * 2
    downloads = {
        path: count
        for (method, path, _), count in proxy.seen.items()
        if method == "GET" and "train-" in path
    }
    assert len(downloads) == 12  # six shards and their indexes
    assert set(downloads.values()) == {1}


def test_two_processes_share_a_cache_smaller_than_the_dataset(
    tmp_path: Path, local: PreparedDataset, proxy: Proxy
) -> None:
    limit = bytes_for(local, 1.5)
    readers = [start(proxy, tmp_path / "cache", limit) for _ in range(2)]
    digests = [reader.communicate(timeout=60)[0].strip() for reader in readers]
    assert digests == [digest_of_images(local.split("train"))] * 2
    assert bytes_held(ShardCache(tmp_path / "cache")) <= limit


def test_process_killed_while_downloading_leaves_no_partial_file(
    tmp_path: Path, local: PreparedDataset, proxy: Proxy
) -> None:
    folder = tmp_path / "cache"
    interrupted = train_shards(local)[3]
    proxy.held = interrupted.file
    reader = start(proxy, folder, bytes_for(local, 1.5))
    wait_until(lambda: (folder / f"{interrupted.digest}.tmp").exists())
    reader.send_signal(signal.SIGKILL)
    reader.communicate()
    proxy.held = ""
    proxy.go.set()
    assert all(file_digest(path) == path.name for path in cached_files(folder))
    again = start(proxy, folder, bytes_for(local, 1.5))
    output = again.communicate(timeout=60)[0].strip()
    assert output == digest_of_images(local.split("train"))
    assert not list(folder.glob("*.tmp"))
