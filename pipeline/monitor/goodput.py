"""Where the time of a run goes: every second belongs to exactly one part.

The time is computed from the logs of the run alone, so a killed process loses nothing: the driver
writes what it begins (``RunDir.timeline``), rank 0 of a training stage how it has spent the time
since its event before (``Event.seconds``). Worked example, a rank that is killed after step 8 while
the newest checkpoint is that of step 6 (times in seconds):

    time  event                               the time since the event before is
       0  call
       9  phase start (of pretrain)           9 start
      14  start, step 0                       5 start
      20  step 4: step 5.0, data_wait 1.0     5 step, 1 data wait
      25  step 6                              5 step
      30  step 8                              5 step: lost, as it turns out below
      32  phase recovery                      2 recovery: it belongs to no step that was logged
      36  start, step 6                       4 recovery; and the 5 of steps 7 and 8 move there
      39  step 8: start 1.0, step 2.0         2 step, 1 recovery

Steps that are done again count as steps the second time: their first time counts as lost.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Mapping, Sequence
from datetime import timedelta
from pathlib import Path

from pipeline.layout import RunDir
from pipeline.monitor import tags
from pipeline.monitor.events import Event, EventWriter, Follower

START = "start"  # of the driver, Ray and the processes, and what connects the stages
PREPARE = "prepare"
STEP = "step"
DATA_WAIT = "data_wait"
CHECKPOINT = "checkpoint"  # while training stands still for it
EVALUATION = "evaluation"  # also the last stages: evaluate and export
RECOVERY = "recovery"  # work that was lost, and the time until new processes train
IDLE = "idle"  # no driver ran, or it waited for machines
ALIVE_S = 60.0  # between two signs of life of the driver
PARTS = (STEP, DATA_WAIT, START, PREPARE, CHECKPOINT, EVALUATION, RECOVERY, IDLE)


class Goodput:
    """Adds up the events of a run, in the order in which they were written.

    Attributes:
        seconds: by part, up to the last event.
        restarts: how often the processes of a stage were started again.
    """

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(PARTS, 0.0)
        self.restarts = 0
        self._time: float | None = None  # of the last event
        self._alive = 0.0  # when the driver was last seen to work
        self._part = START  # that the time from then on belongs to
        # Of each stage: (step, seconds by part) of the steps that a restart may lose.
        self._steps: dict[str, list[tuple[int, dict[str, float]]]] = {}

    @classmethod
    def of(cls, run_dir: RunDir, stages: Sequence[str]) -> Goodput:
        """That of a run so far. ``stages``: the training stages."""
        logs = {"": run_dir.timeline} | {stage: run_dir.events(stage) for stage in stages}
        events = [(event, stage) for stage, log in logs.items() for event in Follower(log).poll()]
        goodput = cls()
        for event, stage in sorted(events, key=lambda entry: entry[0].time):
            goodput.add(event, stage)
        return goodput

    def add(self, event: Event, stage: str = "") -> None:
        """Add the next event: of the driver, or of rank 0 of a training ``stage``."""
        # The clocks of two machines differ a little, and a clock may be set back.
        now = event.time if self._time is None else max(event.time, self._time)
        passed = 0.0 if self._time is None else now - self._time
        under_way = self._part == STEP  # steps whose end nobody has written yet
        if event.kind == "call":
            # Whatever the call before has done since it was last seen alive, it no longer does.
            worked = min(passed, max(0.0, self._alive - (now - passed)))
            self._spend(RECOVERY if under_way else self._part, worked)
            self._spend(IDLE, passed - worked)
            self._part = START
        elif event.kind == "phase":
            self._spend(RECOVERY if under_way else self._part, passed)
            self._part = event.text
        elif event.kind == "start":
            # Without a driver (the command train), nobody has written how the attempt before ended.
            self._spend(IDLE if under_way else self._part, passed)
            self.restarts += self._part == RECOVERY
            self._part = RECOVERY if self._part == RECOVERY else START
            self._lose_steps_after(event.step, stage)
        elif event.seconds:
            self._divide(passed, event, stage)
            self._part = START if event.kind == "end" else STEP
        else:
            # A message, an evaluation, a sign of life: a later event divides the time.
            self._alive = now if event.kind == "alive" else self._alive
            return
        self._time = now

    @classmethod
    def recorded(cls, seconds: Mapping[str, float], restarts: int) -> Goodput:
        """One that was recorded elsewhere; a part that it lacks counts as 0."""
        goodput = cls()
        goodput.seconds |= seconds
        goodput.restarts = restarts
        return goodput

    @property
    def total(self) -> float:
        """Seconds of all parts: since the first call."""
        return sum(self.seconds.values())

    @property
    def share(self) -> float:
        """Share of the steps in the time of training: all parts but preparation and idle time."""
        training = self.total - self.seconds[PREPARE] - self.seconds[IDLE]
        return self.seconds[STEP] / training if training else 0.0

    def scalars(self) -> dict[str, float]:
        """Metrics for TensorBoard: the share, each part's share in the whole time, restarts."""
        shares = {
            tags.goodput_part(part): seconds / max(self.total, 1e-9)
            for part, seconds in self.seconds.items()
        }
        return {tags.GOODPUT: self.share, tags.RESTARTS: float(self.restarts), **shares}

    def in_words(self) -> str:
        """Example: "goodput 83% of 0:12:31: step 71%, prepare 14%, start 9%, evaluation 6%"."""
        shares = {part: seconds / max(self.total, 1e-9) for part, seconds in self.seconds.items()}
        parts = sorted(PARTS, key=lambda part: -shares[part])
        texts = [
            f"{part.replace('_', ' ')} {shares[part]:.0%}" for part in parts if shares[part] > 0.005
        ]
        if self.restarts:
            texts.append(f"restarts {self.restarts}")
        whole = timedelta(seconds=round(self.total))
        return f"goodput {self.share:.0%} of {whole}: {', '.join(texts)}"

    def _spend(self, part: str, seconds: float) -> None:
        self.seconds[part] += seconds

    def _divide(self, passed: float, event: Event, stage: str) -> None:
        """Divide the time since the last event as rank 0 has measured it."""
        measured = sum(event.seconds.values())
        scale = min(1.0, passed / measured) if measured else 0.0
        # What rank 0 spends before its first step belongs to what the driver has begun.
        begun = RECOVERY if self._part == RECOVERY else START
        spent: dict[str, float] = {}
        for part, seconds in event.seconds.items():
            self._spend(begun if part == START else part, scale * seconds)
            if part != START:
                spent[part] = scale * seconds
        self._spend(STEP if self._part == STEP else begun, passed - scale * measured)
        self._steps.setdefault(stage, []).append((event.step, spent))

    def _lose_steps_after(self, step: int, stage: str) -> None:
        steps = self._steps.get(stage, [])
        for done, spent in steps:
            if done > step:
                for part, seconds in spent.items():
                    self.seconds[part] -= seconds
                    self.seconds[RECOVERY] += seconds
        self._steps[stage] = [entry for entry in steps if entry[0] <= step]


def process_start() -> float:
    """When this process was started (seconds since 1970)."""
    # The 22nd value, counted from before the name in brackets: clock ticks since the machine began.
    stat = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    age = time.clock_gettime(time.CLOCK_BOOTTIME) - int(stat[19]) / os.sysconf("SC_CLK_TCK")
    return time.time() - age


class Timeline:
    """The driver's log of what it does, and the goodput of the run.

    Args:
        stages: the training stages.
        started: when this process was started (seconds since 1970).
    """

    def __init__(self, run_dir: RunDir, stages: Sequence[str], started: float) -> None:
        self.goodput = Goodput.of(run_dir, stages)
        self._writer = EventWriter(run_dir.timeline)
        self._write("call", at=started)
        # If this process is killed, the next call knows from these lines for how long it worked.
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._show_life, name="timeline", daemon=True)
        self._thread.start()

    def phase(self, part: str) -> None:
        """From now on, the time belongs to ``part``."""
        self._write("phase", text=part)

    def close(self) -> None:
        """End the call: the time from now on is idle."""
        self._closed.set()
        self._thread.join()
        self.phase(IDLE)
        with contextlib.suppress(OSError):
            self._writer.close()

    def _show_life(self) -> None:
        while not self._closed.wait(ALIVE_S):
            self._write("alive")

    def _write(self, kind: str, *, text: str = "", at: float | None = None) -> None:
        # A log that cannot be written, on a full or absent disk, must not end the run.
        with contextlib.suppress(OSError):
            self.goodput.add(self._writer.write(kind, 0, text=text, at=at))
