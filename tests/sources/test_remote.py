"""Stores that throttle and drop connections: the same dataset or a clear error, no image lost."""

from __future__ import annotations

import errno
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
import s3fs
from fsspec.implementations.memory import MemoryFileSystem

from pipeline.errors import DataError
from pipeline.sources import reader, remote, units
from pipeline.sources.layouts import class_tars as class_tars_layout
from pipeline.sources.remote import MAX_ATTEMPTS, MAX_DELAY, retry_delay, without_secrets
from tests.data.small_datasets import jpeg
from tests.prepare.source_folders import (
    class_folders,
    class_tars,
    images,
    prepare,
    shard_bytes,
    tar_bytes,
    write_tar,
)
from tests.storage import KEY, SECRET, Proxy, environment, s3_server, upload


@pytest.fixture(scope="module")
def server() -> Iterator[tuple[str, int]]:
    with s3_server() as address:
        yield address


@pytest.fixture
def proxy(server: tuple[str, int], monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    """A proxy in front of the server, at the address that the environment gives for the store."""
    proxy = Proxy(*server)
    for name, value in environment(proxy.url).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(remote, "FIRST_DELAY", 0.001)
    s3fs.S3FileSystem.clear_instance_cache()
    yield proxy
    proxy.close()


def imagenet_tars(root: Path) -> Path:
    write_tar(
        root / "ILSVRC2012_img_train.tar",
        {f"n{i:08d}.tar": tar_bytes(images(i, 12)) for i in range(3)},
    )
    validation = {f"ILSVRC2012_val_{i:08d}.JPEG": jpeg(9000 + i, 40, 32) for i in range(1, 8)}
    write_tar(root / "ILSVRC2012_img_val.tar", validation)
    labels = "".join(f"n{i % 3:08d}\n" for i in range(1, 8))
    (root / "imagenet_2012_validation_synset_labels.txt").write_text(labels)
    return root


LAYOUTS = {"class-tars": class_tars, "class-folders": class_folders, "imagenet-tars": imagenet_tars}


@pytest.mark.parametrize("layout", list(LAYOUTS))
def test_throttling_and_dropped_connections_change_no_byte(
    tmp_path: Path,
    server: tuple[str, int],
    proxy: Proxy,
    monkeypatch: pytest.MonkeyPatch,
    layout: str,
) -> None:
    source = LAYOUTS[layout](tmp_path / "in")
    (source / "synsets.txt").write_text(
        "".join(f"{p}{i}\n" for i in range(3) for p in ("c", "n0000000"))
    )
    upload(*server, source, layout)
    prepare(source, tmp_path / "local", shard_rows=25)
    monkeypatch.setattr(reader, "BLOCK", 4096)
    for module in (class_tars_layout, units):
        monkeypatch.setattr(module, "UNIT_BYTES", 1 << 30)
    proxy.share = 0.3
    proxy.seed = 7
    metrics = prepare(f"s3://{layout}", tmp_path / "remote", shard_rows=25)
    assert metrics["rejected"] == 0
    assert shard_bytes(tmp_path / "remote") == shard_bytes(tmp_path / "local")
    assert set(proxy.faults) == set(Proxy.KINDS)
    assert proxy.faults.total() > 5


def test_large_remote_tars_are_cut_like_local_ones(
    tmp_path: Path, server: tuple[str, int], proxy: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = class_tars(tmp_path / "in")
    upload(*server, source, "scanned")
    for module in (class_tars_layout, units):
        monkeypatch.setattr(module, "UNIT_BYTES", 5000)
    prepare(source, tmp_path / "local")
    proxy.share = 0.3
    proxy.seed = 1
    prepare("s3://scanned", tmp_path / "remote")
    assert shard_bytes(tmp_path / "remote") == shard_bytes(tmp_path / "local")


@pytest.mark.parametrize("kind", ["saved", "parquet"])
def test_a_remote_hugging_face_dataset_equals_the_local_one(
    tmp_path: Path, server: tuple[str, int], proxy: Proxy, kind: str
) -> None:
    import datasets

    for split, first, count in (("train", 0, 12), ("validation", 900, 6)):
        rows = {
            "image": [jpeg(first + i, 40, 32) for i in range(count)],
            "label": [i % 3 for i in range(count)],
        }
        dataset = datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image())
        if kind == "saved":
            dataset.save_to_disk(str(tmp_path / "in" / split))
        else:
            dataset.to_parquet(str(tmp_path / "in" / f"{split}-00000.parquet"))
    if kind == "saved":
        (tmp_path / "in" / "dataset_dict.json").write_text('{"splits": ["train", "validation"]}')
    upload(*server, tmp_path / "in", f"hub-{kind}")
    metrics = [
        prepare(root, tmp_path / f"out{i}")
        for i, root in enumerate((tmp_path / "in", f"s3://hub-{kind}"))
    ]
    assert metrics[0] == metrics[1]
    shards = [
        {
            name: data
            for name, data in shard_bytes(tmp_path / f"out{i}").items()
            if name[-4:] == ".idx"
        }
        for i in (0, 1)
    ]
    assert shards[0] == shards[1]
    assert (metrics[0]["images"], metrics[0]["validation"]) == (12, 6)


@pytest.mark.parametrize("fault", ["throttled", "cut", "reset"])
def test_an_unreachable_store_is_an_error_and_a_later_rerun_completes(
    tmp_path: Path,
    server: tuple[str, int],
    proxy: Proxy,
    monkeypatch: pytest.MonkeyPatch,
    fault: str,
) -> None:
    bucket = f"away-{fault}"
    source = class_tars(tmp_path / "in")
    upload(*server, source, bucket)
    prepare(source, tmp_path / "local")
    read_unit = reader.members
    monkeypatch.setattr(
        "pipeline.prepare.extract.members", lambda *args: _break(proxy, fault, read_unit, *args)
    )
    with pytest.raises(DataError) as caught:
        prepare(f"s3://{bucket}", tmp_path / "out")
    text = caught.value.message
    assert text.startswith(f"s3://{bucket}/")
    assert f"could not be read in {MAX_ATTEMPTS} attempts" in text
    assert "-> check that the store is up" in text
    assert SECRET not in text
    assert not list((tmp_path / "out" / "quarantine").rglob("*"))
    monkeypatch.undo()
    for name, value in environment(proxy.url).items():
        monkeypatch.setenv(name, value)
    proxy.always = ""
    prepare(f"s3://{bucket}", tmp_path / "out")
    assert shard_bytes(tmp_path / "out") == shard_bytes(tmp_path / "local")


def _break(proxy: Proxy, fault: str, read_unit: Any, *args: Any) -> Any:
    proxy.always = fault
    return read_unit(*args)


def test_permanent_errors_are_raised_at_once(
    tmp_path: Path, server: tuple[str, int], proxy: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(DataError, match="s3://no-such-bucket: there is no such folder"):
        prepare("s3://no-such-bucket", tmp_path / "out")
    assert max(proxy.seen.values()) <= 2
    upload(*server, class_tars(tmp_path / "in"), "closed")
    proxy.always = "refused"
    proxy.seen.clear()
    with pytest.raises(
        DataError, match=r"s3://closed: access is refused\n  -> give this user.*the environment"
    ) as caught:
        prepare("s3://closed", tmp_path / "out")
    assert SECRET not in caught.value.message
    assert KEY not in caught.value.message
    assert max(proxy.seen.values()) == 1
    for name in environment(""):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    s3fs.S3FileSystem.clear_instance_cache()
    with pytest.raises(DataError, match="s3://closed: access is refused"):
        prepare("s3://closed", tmp_path / "out")


class ShortAnswers:
    """Cuts answers of a memory:// store without an error, twice per request or always."""

    def __init__(self, always: bool = False) -> None:
        self.always = always
        self.seen = Counter[tuple[Any, ...]]()
        self.whole = MemoryFileSystem.cat_file

    def cat_file(
        self, store: MemoryFileSystem, path: str, start: int | None = None, end: int | None = None
    ) -> bytes:
        data = bytes(self.whole(store, path, start=start, end=end))
        self.seen[path, start, end] += 1
        early = end is not None and (self.always or self.seen[path, start, end] <= 2)
        return data[: len(data) // 2] if early else data


@pytest.mark.parametrize("layout", ["class-tars", "class-folders"])
def test_a_short_answer_is_not_taken_for_a_damaged_image(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layout: str
) -> None:
    monkeypatch.setattr(remote, "FIRST_DELAY", 0.001)
    source = LAYOUTS[layout](tmp_path / "in")
    store = fsspec.filesystem("memory")
    for path in source.rglob("*"):
        if path.is_file():
            store.pipe_file(f"/{layout}/{path.relative_to(source)}", path.read_bytes())
    prepare(source, tmp_path / "local")
    for short in (ShortAnswers(), ShortAnswers(always=True)):
        with monkeypatch.context() as patch:
            patch.setattr(
                MemoryFileSystem,
                "cat_file",
                lambda *args, short=short, **span: short.cat_file(*args, **span),
            )
            if not short.always:
                assert prepare(f"memory://{layout}", tmp_path / "remote")["rejected"] == 0
                assert min(short.seen.values()) == 3
            else:
                with pytest.raises(
                    DataError, match=r"could not be read in 8 attempts: \d+ of \d+ bytes came"
                ):
                    prepare(f"memory://{layout}", tmp_path / "never")
    assert shard_bytes(tmp_path / "remote") == shard_bytes(tmp_path / "local")
    assert not list((tmp_path / "never" / "quarantine").rglob("*"))


def test_retry_delays_double_up_to_a_limit_and_differ_per_path() -> None:
    for attempt in range(1, 20):
        longest = min(0.5 * 2 ** (attempt - 1), MAX_DELAY)
        delays = [retry_delay(f"bucket/{i}", attempt) for i in range(50)]
        assert all(longest / 2 <= seconds < longest for seconds in delays)
        assert max(delays) > 1.5 * min(delays)
        assert delays == [retry_delay(f"bucket/{i}", attempt) for i in range(50)]


def test_retries_end_after_the_maximum_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "FIRST_DELAY", 0.001)
    monkeypatch.setattr(remote, "MAX_RETRY_TIME", -1.0)

    def time_out(*_: Any, **__: Any) -> bytes:
        raise TimeoutError("no answer")

    monkeypatch.setattr(MemoryFileSystem, "cat_file", time_out)
    storage, path = remote.open_storage("memory://late")
    with pytest.raises(DataError, match="could not be read in 1 attempts: no answer"):
        storage.read(path)


def test_secrets_of_a_store_do_not_appear_in_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> bytes:
        raise OSError(errno.EINVAL, f"signature of {SECRET} with token t0k3n-planted is wrong")

    monkeypatch.setattr(MemoryFileSystem, "cat_file", refuse)
    options = {"secret": SECRET, "client_kwargs": {"aws_session_token": "t0k3n-planted"}}
    with pytest.raises(DataError) as caught:
        remote.Storage(fsspec.filesystem("memory", **options)).read("/some/file")
    assert "signature of *** with token *** is wrong" in caught.value.message
    assert caught.value.__cause__ is None


def test_urls_are_shown_without_secrets() -> None:
    text = "GET 'https://me:pass@host/a/b.tar?X-Amz-Signature=abc&x=1' failed: 500, see s3://bucket/key"
    assert (
        without_secrets(text)
        == "GET 'https://***@host/a/b.tar?***' failed: 500, see s3://bucket/key"
    )
    with pytest.raises(DataError) as caught:
        remote.open_storage("nosuch://me:pass@host/x?token=abc")
    assert "pass" not in caught.value.message
    assert "abc" not in caught.value.message
