"""Stop requests: training saves first, other stages end at once; announcements say which."""

from __future__ import annotations

import errno
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.config.schema import Job
from pipeline.errors import Interrupted
from pipeline.layout import RunDir
from pipeline.orchestrate.signals import StopRequest
from pipeline.orchestrate.stage_functions import placement
from pipeline.runtime.dist_env import DistEnv
from pipeline.runtime.rank_link import RankLink
from tests.orchestrate.supervised import SupervisedRun, alive, wait_until


@pytest.mark.usefixtures("ray_workers")
def test_training_stops_when_its_slowest_rank_has_saved(tmp_path: Path) -> None:
    def stage_fn(dist_env: DistEnv, link: RankLink) -> dict[str, float]:
        (tmp_path / f"running{dist_env.rank}").touch()
        while not link.stop_requested():
            time.sleep(0.02)
        if dist_env.rank == 0:
            time.sleep(2)  # writes its checkpoint while rank 1 is done already
            (tmp_path / "checkpoint").touch()
        raise Interrupted("stopped")

    def both_run() -> bool:
        return all((tmp_path / f"running{rank}").exists() for rank in range(2))

    with pytest.raises(Interrupted):
        SupervisedRun(tmp_path)(stage_fn, stop=both_run)
    assert (tmp_path / "checkpoint").exists()


def _ignores_the_request(folder: Path) -> Callable[[DistEnv, Callable[[], bool]], dict[str, float]]:
    def stage_fn(dist_env: DistEnv, link: RankLink) -> dict[str, float]:
        (folder / f"pid{dist_env.rank}").write_text(str(os.getpid()))
        time.sleep(600)
        return {}

    return stage_fn


@pytest.mark.usefixtures("ray_workers")
@pytest.mark.parametrize(
    ("stop_grace_s", "message"),
    [
        (0.0, "stopped on request\n  -> rerun the same command to resume"),
        (1.0, "stop requested, but no checkpoint was written within 1 s"),
    ],
)
def test_a_stage_that_ignores_the_request_ends_after_its_grace(
    tmp_path: Path, stop_grace_s: float, message: str
) -> None:
    files = [tmp_path / f"pid{rank}" for rank in range(2)]
    requested: list[float] = []

    def stop() -> bool:
        running = all(file.exists() and file.read_text() for file in files)
        if running and not requested:
            requested.append(time.monotonic())
        return running

    run = SupervisedRun(tmp_path, "evaluate", stop_grace_s)
    with pytest.raises(Interrupted, match=message) as stopped:
        run(_ignores_the_request(tmp_path), stop=stop)
    assert time.monotonic() - requested[0] < stop_grace_s + 5
    assert stopped.value.exit_code == 75
    assert wait_until(lambda: not alive([int(file.read_text()) for file in files]), 5)


@pytest.mark.usefixtures("ray_workers")
def test_a_request_before_the_start_starts_no_process(tmp_path: Path) -> None:
    run = SupervisedRun(tmp_path)
    with pytest.raises(Interrupted):
        run(_ignores_the_request(tmp_path), stop=lambda: True)
    assert list(tmp_path.iterdir()) == []


def test_only_training_has_time_to_save(tmp_path: Path) -> None:
    train = {"epochs": 1, "base_lr": 1e-3}
    stages = {"pretrain": train, "finetune": train, "evaluate": {}, "export": {}}
    model = {"channels": [8, 16, 24, 32], "depths": [1, 1, 1, 1], "columns": 4}
    job = Job.model_validate(
        {"name": "t", "model": model, "data": {"set": {"root": "x"}}, "stages": stages}
    )
    grace = {
        stage: placement(job, stage, RunDir(tmp_path)).stop_grace_s
        for stage in ("pretrain", "finetune", "evaluate", "export")
    }
    assert grace == {"pretrain": 120.0, "finetune": 120.0, "evaluate": 0.0, "export": 0.0}


@pytest.mark.usefixtures("restored_handlers")
@pytest.mark.parametrize(
    ("number", "hint"),
    [
        (signal.SIGINT, " (Ctrl-C again stops at once)"),
        (signal.SIGTERM, ""),
        (signal.SIGUSR1, ""),
        (signal.SIGHUP, ""),
    ],
)
def test_training_announces_a_stop_after_the_current_step(
    number: signal.Signals, hint: str
) -> None:
    messages: list[str] = []
    stop = StopRequest(messages.append)
    stop.install()
    with stop.after_step():
        signal.raise_signal(number)
    assert messages == [f"stopping after the current step{hint}"]
    assert stop()


@pytest.mark.usefixtures("restored_handlers")
def test_stages_with_nothing_to_save_announce_a_stop() -> None:
    messages: list[str] = []
    stop = StopRequest(messages.append)
    stop.install()
    signal.raise_signal(signal.SIGTERM)  # evaluate, export: the supervisor polls the flag
    assert stop()
    stop = StopRequest(messages.append)
    stop.install()
    with pytest.raises(Interrupted), stop.at_once():  # prepare
        signal.raise_signal(signal.SIGTERM)
    assert messages == ["stopping", "stopping"]


@pytest.mark.usefixtures("restored_handlers")
def test_only_a_second_ctrl_c_ends_at_once() -> None:
    messages: list[str] = []
    stop = StopRequest(messages.append)
    stop.install()
    with stop.after_step():
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)  # schedulers send it more than once
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert messages == ["stopping after the current step"]


@pytest.mark.usefixtures("restored_handlers")
def test_sigquit_ends_at_once() -> None:
    stop = StopRequest(lambda text: None)
    stop.install()
    with pytest.raises(KeyboardInterrupt), stop.after_step():
        signal.raise_signal(signal.SIGQUIT)


@pytest.mark.usefixtures("restored_handlers")
@pytest.mark.parametrize(
    "failure",
    [
        RuntimeError("reentrant call inside <_io.BufferedWriter>"),
        OSError(errno.EIO, "Input/output error"),  # the terminal is closed
    ],
)
def test_a_message_that_cannot_be_written_does_not_prevent_the_stop(failure: Exception) -> None:
    def announce(text: str) -> None:
        raise failure

    stop = StopRequest(announce)
    stop.install()
    signal.raise_signal(signal.SIGTERM)
    assert stop()
