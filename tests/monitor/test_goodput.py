"""Every second of a run belongs to one part, also when processes and drivers are killed."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipeline.layout import RunDir
from pipeline.monitor.events import Event, EventWriter
from pipeline.monitor.goodput import (
    CHECKPOINT,
    DATA_WAIT,
    IDLE,
    PREPARE,
    RECOVERY,
    START,
    STEP,
    Goodput,
    Timeline,
    process_start,
)


def goodput_of(*events: Event) -> Goodput:
    """Of events of a driver and of the stage pretrain, in this order."""
    goodput = Goodput()
    for event in events:
        goodput.add(event, "" if event.kind in ("call", "phase", "alive") else "pretrain")
    assert goodput.total == pytest.approx(events[-1].time - events[0].time)
    return goodput


def driver(time: float, kind: str, part: str = "") -> Event:
    return Event(kind=kind, step=0, time=time, text=part)


def rank(time: float, kind: str, done: int, /, **seconds: float) -> Event:
    return Event(kind=kind, step=done, time=time, seconds=seconds)


UNTIL_THE_KILL = (
    driver(0, "call"),
    driver(9, "phase", START),
    rank(14, "start", 0),
    rank(20, "step", 4, step=5.0, data_wait=1.0),
    rank(25, "step", 6, step=5.0),
    rank(30, "step", 8, step=5.0),
)


def parts(goodput: Goodput) -> dict[str, float]:
    return {part: round(value, 9) for part, value in goodput.seconds.items() if value > 1e-9}


def test_lost_steps_and_the_restart_are_recovery() -> None:
    """The worked example of the module."""
    goodput = goodput_of(
        *UNTIL_THE_KILL,
        driver(32, "phase", RECOVERY),
        rank(36, "start", 6),
        rank(39, "step", 8, start=1.0, step=2.0),
    )
    assert parts(goodput) == {START: 14, STEP: 12, DATA_WAIT: 1, RECOVERY: 12}
    assert goodput.restarts == 1
    assert goodput.share == 12 / 39


def test_a_killed_driver_worked_until_it_was_last_seen() -> None:
    goodput = goodput_of(*UNTIL_THE_KILL, driver(31, "alive"), driver(100, "call"))
    assert parts(goodput) == {START: 14, STEP: 15, DATA_WAIT: 1, RECOVERY: 1, IDLE: 69}
    assert goodput.restarts == 0
    preparing = goodput_of(
        driver(0, "call"), driver(2, "phase", PREPARE), driver(62, "alive"), driver(1000, "call")
    )
    assert parts(preparing) == {START: 2, PREPARE: 60, IDLE: 938}


def test_a_stage_ends_with_the_time_that_followed_its_last_step() -> None:
    goodput = goodput_of(
        *UNTIL_THE_KILL,
        rank(34, "end", 8, step=1.0, checkpoint=3.0),
        driver(36, "phase", START),
        driver(37, "phase", IDLE),
        driver(47, "call"),
    )
    assert parts(goodput) == {START: 17, STEP: 16, DATA_WAIT: 1, CHECKPOINT: 3, IDLE: 10}


def test_the_steps_of_another_stage_are_not_lost() -> None:
    goodput = goodput_of(*UNTIL_THE_KILL, rank(30, "end", 8, step=0.5))
    goodput.add(rank(31, "start", 0), "finetune")
    assert goodput.seconds[RECOVERY] == 0
    goodput.add(rank(32, "start", 6), "pretrain")
    assert goodput.seconds[RECOVERY] == 5  # step 8 again


def test_clocks_that_differ_lose_and_invent_nothing() -> None:
    """Rank 0 is on a machine whose clock is behind, and measures more than has passed."""
    goodput = goodput_of(
        driver(0, "call"),
        driver(10, "phase", START),
        rank(9, "start", 0),
        rank(12, "step", 1, step=4.0),
        rank(16, "step", 2, step=4.0),
    )
    assert parts(goodput) == {START: 10, STEP: 6}


def test_a_run_is_added_up_from_its_files(tmp_path: Path) -> None:
    run_dir = RunDir(tmp_path)
    timeline = Timeline(run_dir, ["pretrain"], started=1000.0)
    timeline.phase(START)
    events = EventWriter(run_dir.events("pretrain"))
    events.write("start", 0)
    timeline.goodput.add(events.write("step", 1, seconds={STEP: 1e-9}), "pretrain")
    timeline.close()
    total = timeline.goodput.total
    again = Timeline(run_dir, ["pretrain"], started=0.0)  # a clock that was set back
    assert again.goodput.total == pytest.approx(total)
    assert again.goodput.seconds == pytest.approx(timeline.goodput.seconds)
    again.close()


def test_a_process_knows_when_it_was_started() -> None:
    code = "from pipeline.monitor.goodput import process_start; print(process_start())"
    before = time.time()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert before - 0.05 < float(done.stdout) < time.time()
    assert process_start() < before


def test_the_words_name_the_largest_parts_first() -> None:
    goodput = Goodput.recorded({STEP: 700, PREPARE: 200, START: 97, IDLE: 3}, restarts=2)
    assert goodput.in_words() == (
        "goodput 88% of 0:16:40: step 70%, prepare 20%, start 10%, restarts 2"
    )
