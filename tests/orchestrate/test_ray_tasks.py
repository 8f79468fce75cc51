"""Ray tasks: one result per item, errors keep their type, tasks of lost workers are retried."""

from __future__ import annotations

import errno
import os
import signal
import threading
import time
from functools import partial
from pathlib import Path

import pytest

from pipeline.errors import DataError, Interrupted, StageError
from pipeline.orchestrate.ray_session import RaySession
from pipeline.orchestrate.signals import StopRequest

pytestmark = pytest.mark.usefixtures("ray_workers")


def _square(number: int) -> int:
    return number * number


def _sleep(seconds: int) -> None:
    time.sleep(seconds)


def _die_once(folder: Path, number: int) -> int:
    mark = folder / str(number)
    if number % 5 == 0 and not mark.exists():
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return number


def _fail(kind: str, number: int) -> int:
    if number == 7:
        if kind == "user":
            raise DataError("bad tar", place="n01.tar", remedy="mend it")
        if kind == "disk":
            raise OSError(errno.ENOSPC, "No space left on device", "/data/unit.parquet")
        raise ZeroDivisionError("a bug")
    return number


def test_every_item_has_one_result(session: RaySession) -> None:
    assert dict(session.map_tasks(_square, range(50))) == {
        number: number * number for number in range(50)
    }
    assert list(session.map_tasks(_square, [])) == []


def test_the_task_of_a_killed_worker_is_retried(session: RaySession, tmp_path: Path) -> None:
    assert dict(session.map_tasks(partial(_die_once, tmp_path), range(12))) == {
        number: number for number in range(12)
    }
    assert len(list(tmp_path.iterdir())) == 3


@pytest.mark.usefixtures("restored_handlers")
def test_a_stop_request_interrupts_the_wait_for_tasks(session: RaySession) -> None:
    stop = StopRequest(lambda text: None)
    stop.install()
    timer = threading.Timer(1.0, os.kill, (os.getpid(), signal.SIGTERM))
    timer.start()
    with pytest.raises(Interrupted), stop.at_once():
        list(session.map_tasks(_sleep, [600, 600]))
    timer.join()


def test_errors_keep_their_type(session: RaySession) -> None:
    with pytest.raises(DataError, match=r"n01\.tar: bad tar\n  -> mend it"):
        list(session.map_tasks(partial(_fail, "user"), range(20)))
    with pytest.raises(
        StageError, match=r"/data/unit\.parquet: the disk is full\n  -> free some space"
    ):
        list(session.map_tasks(partial(_fail, "disk"), range(20)))
    with pytest.raises(StageError, match="ZeroDivisionError: a bug"):
        list(session.map_tasks(partial(_fail, "bug"), range(20)))
