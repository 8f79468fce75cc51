"""Progress for people: a live display on a terminal, plain lines at intervals in a pipe or log file.

Nothing is sent to it: it follows the event log that rank 0 writes, so the driver of a group of processes and a process
that trains alone show the same.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TextIO

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from pipeline.monitor.events import Event, Follower

LEVEL_STYLES = {"info": "dim", "warning": "yellow", "error": "red"}


@dataclass
class Figures:
    """The newest of what the display shows."""

    step: int = 0
    total: int = 0
    epoch: int = 0
    rate: float = 0.0  # images a second
    loss: float | None = None
    accuracy: float | None = None  # share of the validation split

    def take(self, event: Event) -> None:
        self.step = event.step
        self.total = event.total or self.total
        self.epoch = event.epoch or self.epoch
        self.rate = event.scalars.get("throughput/images_per_s", self.rate)
        self.loss = event.scalars.get("loss/total", self.loss)
        self.accuracy = event.scalars.get("accuracy/top1", self.accuracy)

    def __str__(self) -> str:
        parts = [f"{self.rate:,.1f} images/s"] if self.rate else []
        parts += [f"loss {self.loss:.4f}"] if self.loss is not None else []
        parts += [f"top-1 {self.accuracy:.1%}"] if self.accuracy is not None else []
        return "  ".join(parts)


class Display:
    """Shows one stage at a time.

    Args:
        console: where to; a live bar if it is a terminal.
        log: a file that gets the plain lines too, with the time in front.
        interval: seconds between plain lines.
    """

    def __init__(
        self,
        console: Console,
        log: TextIO | None = None,
        interval: float = 10.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.console, self._log, self._interval, self._clock = console, log, interval, clock
        self._name = ""
        self._what: str | None = None  # the piece of work that is under way
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        self._last_line = -interval
        self._begun = (0, 0.0)  # count and time at which the present piece of work began

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """While open, ``progress`` and ``Follow.poll`` report under ``name``."""
        self._name, self._last_line, self._what = name, -self._interval, None
        if not self.console.is_terminal:
            yield
            return
        columns = (
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=None),
            TextColumn("{task.completed:,.0f}/{task.total:,.0f}"),
            TextColumn("{task.fields[detail]}", style="cyan"),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=self.console, transient=True) as self._bar:
            self._task = self._bar.add_task(name, total=0, detail="")
            try:
                yield
            finally:
                self._bar = self._task = None

    def progress(self, task: str, done: int, total: int, detail: str = "") -> None:
        """``done`` of ``total`` pieces of ``task`` are finished."""
        now = self._clock()
        if task != self._what or done < self._begun[0]:
            self._what, self._begun = task, (done, now)
            if self._bar is not None and self._task is not None:
                self._bar.reset(self._task)
        if self._bar is not None and self._task is not None:
            label = escape(f"{self._name}: {task}" if task else self._name)
            self._bar.update(
                self._task, description=label, completed=done, total=total, detail=detail
            )
        if now - self._last_line >= self._interval or done == total:
            self._last_line = now
            label = f"{self._name}: {task}" if task else self._name
            left = self._left(done, total, now)
            line = "  ".join(part for part in (f"{label} {done}/{total}", detail, left) if part)
            self._print(line, on_screen=self._bar is None)

    def log(self, text: str, level: str = "info") -> None:
        """A sentence that stays on the screen."""
        prefix = "" if level == "info" else f"{level}: "
        self._print(prefix + text, LEVEL_STYLES.get(level, ""))

    def _left(self, done: int, total: int, now: float) -> str:
        begun, since = self._begun
        if done <= begun or done >= total:
            return ""
        seconds = round((now - since) * (total - done) / (done - begun))
        return f"{timedelta(seconds=seconds)} left"

    def _print(self, text: str, style: str = "", *, on_screen: bool = True) -> None:
        if on_screen:
            self.console.print(text, style=style, markup=False, highlight=False, soft_wrap=True)
        if self._log is not None:
            now = time.strftime("%Y-%m-%d %H:%M:%S ")
            self._log.writelines(f"{now}{line}\n" for line in text.splitlines())
            self._log.flush()


class Follow:
    """Feeds a display from a stage's event log; ``poll`` is called as often as one likes.

    ``highest`` is the largest step seen: whether a restarted group of processes got any further.
    """

    def __init__(self, path: Path, display: Display) -> None:
        self._follower, self._display, self._figures = (
            Follower(path, from_end=True),
            display,
            Figures(),
        )
        self.highest = 0

    def poll(self) -> None:
        """Show what was written since the last call."""
        for event in self._follower.poll():
            self._show(event)

    def _show(self, event: Event) -> None:
        if event.kind == "message":
            self._display.log(event.text, event.level)
        elif event.kind == "evaluation":
            self._figures.take(event)
            values = "  ".join(
                f"{name.removeprefix('accuracy/')} {value:.4g}"
                for name, value in event.scalars.items()
            )
            self._display.log(f"evaluation after step {event.step}: {values}")
        elif event.kind == "step":
            self._figures.take(event)
            self.highest = max(self.highest, event.step)
            epoch = f"epoch {self._figures.epoch + 1}"
            self._display.progress("", event.step, self._figures.total, f"{epoch}  {self._figures}")


@contextlib.contextmanager
def following(follow: Follow, interval: float = 0.5) -> Iterator[None]:
    """Poll in a thread, for a process whose main thread trains."""
    done = threading.Event()

    def loop() -> None:
        while not done.wait(interval):
            follow.poll()

    thread = threading.Thread(target=loop, name="display", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        follow.poll()
