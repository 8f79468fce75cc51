"""The event log survives writers that are killed at any byte."""

from __future__ import annotations

import math
import tempfile
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from pipeline.monitor.events import Event, EventWriter, Follower, read_events


def _write(path: Path, first: int, last: int) -> None:
    writer = EventWriter(path)
    writer.write("start", first)
    for step in range(first + 1, last + 1):
        writer.write("step", step, total=9, scalars={"loss/total": float(step)})
    writer.close()


def _steps(events: list[Event]) -> list[int]:
    return [event.step for event in events if event.kind == "step"]


def test_steps_of_a_resumed_run_replace_those_that_it_repeats(tmp_path: Path) -> None:
    path = tmp_path / "logs" / "pretrain.jsonl"
    _write(path, 0, 5)
    _write(path, 3, 7)
    assert _steps(read_events(path)) == [1, 2, 3, 4, 5, 6, 7]
    assert len(_steps(Follower(path).poll())) == 9  # nothing is deleted


@given(cut=st.integers(1, 200))
def test_a_log_cut_at_any_byte_can_be_continued(cut: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "events.jsonl"
        _write(path, 0, 2)
        path.write_bytes(path.read_bytes()[:-cut])
        EventWriter(path).close()  # ends the line that was cut
        before = _steps(read_events(path))
        _write(path, 2, 4)
        assert _steps(read_events(path)) == [step for step in before if step <= 2] + [3, 4]


def test_a_follower_returns_each_complete_line_once(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    follower = Follower(path)
    assert follower.poll() == []
    path.write_text('{"kind":"step","step":1,"time":0.5}\n{"kind":"st')
    assert [event.step for event in follower.poll()] == [1]
    with open(path, "a") as file:
        file.write('ep","step":2,"time":0.5}\n')
    assert [event.step for event in follower.poll()] == [2]
    assert follower.poll() == []


def test_nan_and_infinity_are_read_back(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    writer = EventWriter(path)
    writer.write("step", 1, scalars={"loss/total": math.nan, "optim/grad_norm": math.inf})
    (event,) = read_events(path)
    assert math.isnan(event.scalars["loss/total"])
    assert event.scalars["optim/grad_norm"] == math.inf


def test_lines_of_other_versions_are_skipped(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    path.write_text(
        '{"kind":"step","step":1,"time":0.5,"scalars":{"reversible/repeated_steps":1.0}}\n'
        '{"kind":"step","step":2,"time":0.5,"field of another version":1}\n'
        "3\n"
        '{"kind":"step","step":4,"time":0.5}\n'
    )
    assert _steps(read_events(path)) == [1, 4]
