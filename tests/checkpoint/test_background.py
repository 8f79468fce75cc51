"""Writing behind the training: what waits for what, and what happens when a write fails."""

from __future__ import annotations

import os
import resource
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from pipeline.checkpoint import background, rank_file
from pipeline.checkpoint.background import BackgroundWriter
from pipeline.checkpoint.manifest import Manifest, directory_of, list_checkpoints
from pipeline.checkpoint.reader import CheckpointReader
from pipeline.checkpoint.retention import Retention
from pipeline.errors import StageError
from tests.checkpoint.process_alone import alone

SIZE = 100_000  # elements


@pytest.fixture
def writer(monkeypatch: pytest.MonkeyPatch) -> Iterator[BackgroundWriter]:
    monkeypatch.setattr(background, "PAUSES_S", (0.01, 0.01, 0.01))
    with alone():
        writer = BackgroundWriter(pin_memory=False, may_commit=lambda: True)
        yield writer
        writer.wait()


def start(writer: BackgroundWriter, root: Path, step: int, last: int = 2) -> None:
    values = torch.full((SIZE,), float(step))
    owned = [("weight", (SIZE,), 0, "master", values)]
    writer.start(directory_of(root, step), owned, {"applied": step}, Retention(last=last))
    values.zero_()  # the next step, at once


def steps(root: Path) -> list[int]:
    return [step for step, _ in list_checkpoints(root)]


def value(root: Path, step: int) -> float:
    directory = directory_of(root, step)
    manifest = Manifest.read(directory)
    manifest.verify(directory)
    whole = CheckpointReader(directory, manifest).full("master", "weight")
    assert bool((whole == whole[0]).all())
    return float(whole[0])


def hold(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Make writes to files wait for an event, as a slow disk does."""
    go = threading.Event()
    write_all = rank_file._write_all

    def held(descriptor: int, data: bytes | memoryview) -> None:
        assert go.wait(30)
        write_all(descriptor, data)

    monkeypatch.setattr(rank_file, "_write_all", held)
    return go


def test_training_does_not_wait_for_the_disk(
    writer: BackgroundWriter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    go = hold(monkeypatch)
    start(writer, tmp_path, 5)
    # Here steps would be trained: the values are zero already.
    assert writer.reports() == []
    assert steps(tmp_path) == []
    go.set()
    writer.wait()
    (report,) = writer.reports()
    assert report.failure is None
    assert value(tmp_path, 5) == 5


def test_the_next_checkpoint_waits_for_the_one_before(
    writer: BackgroundWriter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    go = hold(monkeypatch)
    start(writer, tmp_path, 1)
    second = threading.Thread(target=start, args=(writer, tmp_path, 2))
    second.start()
    assert steps(tmp_path) == []
    go.set()
    second.join(30)
    writer.wait()
    assert [value(tmp_path, step) for step in (1, 2)] == [1, 2]


def test_old_checkpoints_are_deleted_only_after_a_newer_one_is_complete(
    writer: BackgroundWriter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for step in (1, 2, 3):
        start(writer, tmp_path, step, last=1)
        writer.wait()
        assert steps(tmp_path) == [step]
    go = hold(monkeypatch)
    start(writer, tmp_path, 4, last=1)
    assert steps(tmp_path) == [3]
    go.set()
    writer.wait()
    assert steps(tmp_path) == [4]


def test_a_checkpoint_of_the_same_step_replaces_the_one_before(
    writer: BackgroundWriter, tmp_path: Path
) -> None:
    """A step that is bad again after a crash is captured a second time."""
    for _ in range(2):
        start(writer, tmp_path, 5)
        writer.wait()
        assert [report.failure for report in writer.reports()] == [None]
    assert value(tmp_path, 5) == 5
    assert not list(tmp_path.glob(".*"))


def no_room(root: Path) -> Callable[[], None]:
    """No file may be larger than a few bytes, as on a full disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def no_folder(root: Path) -> Callable[[], None]:
    """A file lies where the folder should: nothing can be created in it, not even by root."""
    shutil.rmtree(root)
    root.write_text("")
    return root.unlink


@pytest.mark.parametrize("fault", [no_room, no_folder])
def test_a_write_that_fails_is_tried_again(
    fault: Callable[[Path], Callable[[], None]],
    writer: BackgroundWriter,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    root = tmp_path / "checkpoints"
    start(writer, root, 1)
    writer.wait()
    assert [report.failure for report in writer.reports()] == [None]
    mend = fault(root)
    monkeypatch.setattr(background, "PAUSES_S", (0.01, 60.0))
    try:
        start(writer, root, 2)
        failures = []
        while len(failures) < 2:
            failures += writer.reports()
    finally:
        mend()
    assert all(report.failure for report in failures)
    assert not any(report.final for report in failures)
    start(writer, root, 3)  # gives up the pause of a minute
    writer.wait()
    (report,) = writer.reports()
    assert (report.target.name, report.failure) == ("step-00000003", None)
    assert value(root, 3) == 3
    assert not list(root.glob(".*"))


def test_the_last_attempt_is_final(writer: BackgroundWriter, tmp_path: Path) -> None:
    root = tmp_path / "checkpoints"
    root.mkdir()
    mend = no_folder(root)
    start(writer, root, 1)
    writer.wait()
    mend()
    reports = writer.reports()
    assert [report.final for report in reports] == [False] * 3 + [True]
    assert all(os.fspath(root) in (report.failure or "") for report in reports)


def test_a_group_that_was_replaced_does_not_commit(tmp_path: Path) -> None:
    with alone():
        writer = BackgroundWriter(pin_memory=False, may_commit=lambda: False)
        start(writer, tmp_path, 1)
        writer.wait()
        with pytest.raises(StageError, match="replaced this one"):
            writer.reports()
    assert not list(tmp_path.iterdir())
