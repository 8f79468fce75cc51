"""Ranks that are slower than the others: measured where the work is done, and named."""

from __future__ import annotations

import itertools
import socket
import statistics
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

from pipeline.monitor import tags
from pipeline.train.step_times import DATA, FORWARD, UPDATE, StepTimes
from pipeline.train.stragglers import Stragglers, _medians_of_others
from tests.train import processes

FACTOR = 1.5


def compared(
    intervals: list[list[float]], log_every_s: float
) -> tuple[list[str], list[dict[str, float]]]:
    """What one rank logs and returns; ``intervals``: forward seconds of all ranks, per log."""
    dist.init_process_group("gloo")
    messages: list[str] = []

    def log(text: str, level: str = "info") -> None:
        messages.append(f"{level}: {text}")

    logs = itertools.count()
    comparison = Stragglers(FACTOR, log, lambda: next(logs) * log_every_s)
    rank = dist.get_rank()
    scalars = [
        comparison.compare({DATA: 0.1, FORWARD: times[rank], UPDATE: 9.0}) for times in intervals
    ]
    dist.destroy_process_group()
    return messages, scalars


@pytest.mark.parametrize("ranks", [2, 3])
def test_a_slow_rank_is_named_once_with_its_host(tmp_path: Path, ranks: int) -> None:
    slow = [1.1] * (ranks - 1) + [2.3]
    even = [1.1] * ranks
    # Two slow intervals in a row may be chance.
    intervals = [slow, slow, even, slow, slow, slow, slow]
    results = processes.run(tmp_path, ranks, compared, intervals, 30.0)
    for messages, scalars in results:
        (message,) = messages
        assert message.startswith(f"warning: rank {ranks - 1} on {socket.gethostname()} is slow: 2")
        assert "(0.10 s for data, 2.30 s for the forward pass" in message
        assert scalars[-1][tags.SLOWEST_RANK] == ranks - 1
        assert scalars[-1][tags.RANK_SPREAD] == pytest.approx(1.0)
        assert scalars[2][tags.RANK_SPREAD] == pytest.approx(0.0)


def test_some_slow_steps_name_nobody(tmp_path: Path) -> None:
    intervals = [[1.1, 2.3]] * 6
    for messages, _ in processes.run(tmp_path, 2, compared, intervals, 1.0):
        assert messages == []


@given(st.lists(st.floats(0, 1e6), min_size=2, max_size=9))
def test_each_value_is_compared_with_the_median_of_the_others(values: list[float]) -> None:
    expected = [
        statistics.median(values[:index] + values[index + 1 :]) for index in range(len(values))
    ]
    assert _medians_of_others(values) == expected


def test_one_rank_is_compared_with_nobody(tmp_path: Path) -> None:
    ((messages, scalars),) = processes.run(tmp_path, 1, alone, tmp_path / "rendezvous")
    assert (messages, scalars) == ([], [{}])


def alone(rendezvous: Path) -> tuple[list[str], list[dict[str, float]]]:
    messages: list[str] = []
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=0, world_size=1)
    comparison = Stragglers(FACTOR, lambda text, level="info": messages.append(text))
    return messages, [comparison.compare({FORWARD: 9.0})]


class GpuEvent:
    """An event of a GPU on which each piece of work takes 50 ms; launching it takes no time."""

    now = 0.0  # milliseconds
    waits = 0

    def __init__(self, device: torch.device, *, enable_timing: bool) -> None:
        assert enable_timing
        assert device.type == "cuda"

    def record(self) -> None:
        GpuEvent.now += 50.0
        self.time = GpuEvent.now

    def synchronize(self) -> None:
        GpuEvent.waits += 1

    def elapsed_time(self, end: GpuEvent) -> float:
        return end.time - self.time


def test_phases_on_a_gpu_are_measured_by_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "Event", GpuEvent)
    times = StepTimes(torch.device("cuda"))
    for _ in range(3):
        with times.phase(DATA):
            pass
        with times.phase(FORWARD):
            pass
    assert GpuEvent.waits == 0  # nothing waits within a step
    seconds = times.take()
    assert seconds[FORWARD] == pytest.approx(0.15)
    assert seconds[DATA] < 0.05
    assert times.take() == {}
