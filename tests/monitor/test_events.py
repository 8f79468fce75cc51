"""The event log survives writers that are killed at any byte."""

from __future__ import annotations

import math
import tempfile
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from pipeline.monitor.events import EventWriter, Follower, read_events


def _write(path: Path, first: int, last: int) -> None:
    writer = EventWriter(path)
    writer.write("start", first)
    for step in range(first + 1, last + 1):
        writer.write("step", step, total=9, scalars={"loss/total": float(step)})
    writer.close()


def test_a_resume_replaces_the_steps_it_repeats(tmp_path: Path) -> None:
    path = tmp_path / "logs" / "pretrain.jsonl"
    _write(path, 0, 5)
    _write(path, 3, 7)
    assert [event.step for event in read_events(path) if event.kind == "step"] == [
        1,
        2,
        3,
        4,
        5,
        6,
        7,
    ]
    assert (
        len([event for event in Follower(path).poll() if event.kind == "step"]) == 9
    )  # nothing is deleted


@given(cut=st.integers(1, 200))
def test_cut_at_any_byte_then_continued(cut: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "events.jsonl"
        _write(path, 0, 2)
        path.write_bytes(path.read_bytes()[:-cut])
        EventWriter(path).close()  # ends the line that was cut
        before = [event.step for event in read_events(path) if event.kind == "step"]
        _write(path, 2, 4)
        steps = [event.step for event in read_events(path) if event.kind == "step"]
        assert steps == [step for step in before if step <= 2] + [3, 4]


def test_a_follower_sees_whole_lines_only_and_each_once(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    follower = Follower(path)
    assert follower.poll() == []
    path.write_text('{"kind":"step","step":1,"time":0.5}\n{"kind":"st')
    assert [event.step for event in follower.poll()] == [1]
    with open(path, "a") as file:
        file.write('ep","step":2,"time":0.5}\n')
    assert [event.step for event in follower.poll()] == [2]
    assert follower.poll() == []


def test_numbers_that_are_not_finite_come_back(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    writer = EventWriter(path)
    writer.write("step", 1, scalars={"loss/total": math.nan, "optim/grad_norm": math.inf})
    (event,) = read_events(path)
    assert math.isnan(event.scalars["loss/total"])
    assert event.scalars["optim/grad_norm"] == math.inf
