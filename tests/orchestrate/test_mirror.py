"""The copy of a run in a store: complete, verified, and enough to resume in an empty directory."""

from __future__ import annotations

import json
import os
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from pipeline.checkpoint.background import BackgroundWriter
from pipeline.checkpoint.manifest import Manifest, directory_of, list_checkpoints
from pipeline.checkpoint.retention import Retention
from pipeline.errors import CheckpointError, DataError
from pipeline.files import write_json, write_text
from pipeline.layout import RunDir
from pipeline.orchestrate.mirror import Mirror, mirrored
from pipeline.sources.remote import open_storage
from pipeline.sources.remote_files import WritableStorage
from tests.checkpoint.process_alone import alone
from tests.e2e.job_runs import finish, results, run, start, wait_for
from tests.prepare.source_folders import class_tars
from tests.storage import Proxy, environment, s3_server


def checkpoint(run_dir: RunDir, step: int, last: int = 2) -> Path:
    """Write a real checkpoint of one parameter."""
    directory = directory_of(run_dir.checkpoints("pretrain"), step)
    with alone():
        writer = BackgroundWriter(pin_memory=False, may_commit=lambda: True)
        owned = [("weight", (50,), 0, "master", torch.full((50,), float(step)))]
        writer.start(directory, owned, {}, Retention(last=last))
        writer.wait()
        assert [report.failure for report in writer.reports()] == [None]
    return directory


def steps(run_dir: RunDir) -> list[int]:
    return [step for step, _ in list_checkpoints(run_dir.checkpoints("pretrain"))]


@pytest.fixture
def run_dir(tmp_path: Path) -> RunDir:
    run_dir = RunDir(tmp_path / "runs" / "mine")
    write_json(run_dir.run_json, {"name": "mine"})
    write_text(run_dir.run_yaml, "name: mine\n")
    write_text(run_dir.events("pretrain"), "{}\n")
    write_text(run_dir.started_with("pretrain"), "{}\n")
    checkpoint(run_dir, 4)
    return run_dir


def mirror_of(run_dir: RunDir, store: Path) -> Mirror:
    storage, path = open_storage(str(store))
    root = f"{path}/{run_dir.path.name}"
    return Mirror(run_dir=run_dir, storage=WritableStorage(storage.fs), root=root)


def restored(store: Path, path: Path) -> tuple[RunDir, list[str]]:
    """A new directory with what the store has, and the messages."""
    copy = RunDir(path / "mine")
    messages: list[str] = []
    mirror_of(copy, store).restore(lambda text, level="info": messages.append(f"{level}: {text}"))
    return copy, messages


def contents(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def test_the_store_holds_the_run_and_an_empty_directory_gets_it(
    run_dir: RunDir, tmp_path: Path
) -> None:
    store = tmp_path / "store"
    messages = mirror_of(run_dir, store).sync()
    assert messages == ["checkpoint at step 4 of pretrain copied to the mirror"]
    assert contents(store / "mine") == contents(run_dir.path)
    copy, _ = restored(store, tmp_path / "elsewhere")
    assert contents(copy.path) == contents(run_dir.path)


def test_only_what_is_new_is_uploaded_and_retention_follows(
    run_dir: RunDir, tmp_path: Path
) -> None:
    store = tmp_path / "store"
    mirror = mirror_of(run_dir, store)
    mirror.sync()
    unchanged = store / "mine/run.yaml"
    os.utime(unchanged, ns=(0, 0))
    assert mirror.sync() == []
    checkpoint(run_dir, 8)
    write_text(run_dir.events("pretrain"), "{}\n{}\n")
    assert mirror.sync() == ["checkpoint at step 8 of pretrain copied to the mirror"]
    checkpoint(run_dir, 12)
    assert steps(run_dir) == [12, 8]
    mirror.sync()
    assert contents(store / "mine") == contents(run_dir.path)
    assert unchanged.stat().st_mtime_ns == 0


def test_a_checkpoint_newer_than_those_here_stays_in_the_store(
    run_dir: RunDir, tmp_path: Path
) -> None:
    store = tmp_path / "store"
    mirror = mirror_of(run_dir, store)
    newest = checkpoint(run_dir, 8)
    mirror.sync()
    shutil.rmtree(newest)  # damaged here, for example
    mirror.sync()
    copy, _ = restored(store, tmp_path / "elsewhere")
    assert steps(copy) == [8]


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 16
    path.write_bytes(data)


def test_a_damaged_copy_is_passed_over(run_dir: RunDir, tmp_path: Path) -> None:
    store = tmp_path / "store"
    checkpoint(run_dir, 8)
    mirror_of(run_dir, store).sync()
    copies = store / "mine/checkpoints/pretrain"
    flip(copies / "step-00000008/rank-00000.safetensors")
    copy, messages = restored(store, tmp_path / "a")
    assert steps(copy) == [4]
    (warning,) = [text for text in messages if text.startswith("warning")]
    assert "rank-00000.safetensors: checksum mismatch" in warning
    flip(copies / "step-00000004/manifest.json")
    with pytest.raises(CheckpointError, match="none of the 2 checkpoints of pretrain"):
        restored(store, tmp_path / "b")
    assert not list((tmp_path / "b").rglob("*.json"))


def test_an_upload_that_was_cut_short_counts_for_nothing(run_dir: RunDir, tmp_path: Path) -> None:
    store = tmp_path / "store"
    checkpoint(run_dir, 8)
    mirror_of(run_dir, store).sync()
    (store / "mine/checkpoints/pretrain/step-00000008/manifest.json").unlink()
    copy, _ = restored(store, tmp_path / "elsewhere")
    assert steps(copy) == [4]
    mirror_of(run_dir, store).sync()  # a new process uploads it again
    copy, _ = restored(store, tmp_path / "again")
    assert steps(copy) == [8]


def test_what_the_store_returns_is_compared(
    run_dir: RunDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mirror = mirror_of(run_dir, tmp_path / "store")
    upload = type(mirror.storage).upload

    def damaging(self: object, local: Path, path: str) -> None:
        upload(mirror.storage, local, path)
        flip(Path(path))

    monkeypatch.setattr(type(mirror.storage), "upload", damaging)
    with pytest.raises(DataError, match="returns other bytes"):
        mirror.sync()
    assert not list((tmp_path / "store").rglob("manifest.json"))


def test_a_store_that_fails_is_only_a_warning(run_dir: RunDir, tmp_path: Path) -> None:
    (tmp_path / "store").write_text("a file where the folder should be")
    messages: list[str] = []
    warned = threading.Event()

    def log(text: str, level: str = "info") -> None:
        messages.append(f"{level}: {text}")
        warned.set()

    with mirrored(mirror_of(run_dir, tmp_path / "store"), log, 30):
        assert warned.wait(30)
    assert messages[0].startswith("warning: the mirror could not be written, the run continues")


JOB = """
name: small
model: {{channels: [8, 8, 8, 8], depths: [1, 1, 1, 1], columns: 1}}
cluster: {{processes: 1}}
data: {{root: {root}, min_side: 16, shard_rows: 30}}
checkpoints: {{mirror: "{mirror}"}}
stages:
  prepare: {{}}
  pretrain:
    {{image_size: 32, epochs: {epochs}, global_batch: 16, precision: fp32, base_lr: 1e-3,
     intermediate_supervision: false, checkpoint_every_steps: 2, augment: {{mixup: 0, cutmix: 0}}}}
  export: {{from: pretrain}}
"""


@pytest.fixture
def proxy() -> Iterator[Proxy]:
    """An S3 server behind a proxy that throttles, resets and cuts some requests."""
    with s3_server() as (host, port):
        proxy = Proxy(host, port, seed=1, share=0.1, in_a_row=1)
        yield proxy
        proxy.close()


@pytest.mark.slow
def test_a_new_machine_continues_from_the_mirror_to_the_same_bits(
    proxy: Proxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import boto3

    for name, value in environment(proxy.url).items():
        monkeypatch.setenv(name, value)
    boto3.client("s3").create_bucket(Bucket="mirror")
    root = class_tars(tmp_path / "images", count=16, validation=4)
    jobs = []
    for name, url in (("first", "s3://mirror/runs"), ("second", "s3://mirror/runs"), ("alone", "")):
        folder = tmp_path / name
        folder.mkdir()
        job = folder / "small.yaml"
        job.write_text(JOB.format(root=root, mirror=url, epochs=4))
        jobs.append(job)
    first, second, undisturbed = jobs
    process = start(first)
    manifests = first.parent / "runs/small/checkpoints/pretrain"
    assert wait_for(lambda: len(list(manifests.glob("step-*"))) >= 2, process)
    process.terminate()
    code, out = finish(process)
    assert code == 75, out
    shutil.rmtree(first.parent / "runs")  # the machine is gone
    out = run(second)
    assert "copying the run from s3://mirror/runs/small" in out
    assert "resuming from step" in out
    run(undisturbed)
    assert results(second.parent / "runs/small") == results(undisturbed.parent / "runs/small")
    steps_done = json.loads((second.parent / "runs/small/run.json").read_text())
    assert steps_done["stages"]["pretrain"]["state"] == "done"
    newest = list_checkpoints(second.parent / "runs/small/checkpoints/pretrain")[0][1]
    Manifest.read(newest).verify(newest)
