"""Shows progress: a live bar on a terminal, plain lines at intervals in a pipe or a log file.

The display reads the event log that rank 0 writes. No metric travels through Ray, so the driver of
a process group and a process that trains alone show the same.
"""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TextIO

from rich.console import Console
from rich.live import Live

from pipeline.metric_text import metric_text
from pipeline.monitor import tags
from pipeline.monitor.events import Event, Follower
from pipeline.monitor.goodput import Goodput
from pipeline.monitor.progress_line import PhaseLine, ProgressLine

_REFRESHES_PER_S = 4  # of the live line
_PIPE_WIDTH = 160  # columns of tables where the output is no terminal
LEVEL_STYLES = {"info": "dim", "warning": "yellow", "error": "red"}


def output_console() -> Console:
    """The console of standard output. Where that is no terminal, tables have room."""
    return Console(highlight=False, width=None if sys.stdout.isatty() else _PIPE_WIDTH)


@dataclass(kw_only=True)
class LatestMetrics:
    """The newest value of each metric that the display shows."""

    total: int = 0  # steps of the stage
    epoch: int = 0  # from 1; 0: not known
    images_per_s: float = 0.0
    loss: float | None = None
    accuracy: float | None = None  # top-1 on the validation split, 0 to 1
    goodput: float | None = None  # share of the steps in the time of training

    def update(self, event: Event) -> None:
        """Take the values from ``event``; a metric that it lacks keeps its value."""
        self.total = event.total or self.total
        self.epoch = event.epoch or self.epoch
        self.images_per_s = event.scalars.get(tags.IMAGES_PER_S, self.images_per_s)
        self.loss = event.scalars.get(tags.LOSS, self.loss)
        self.accuracy = event.scalars.get(tags.TOP1, self.accuracy)

    def in_words(self) -> list[str]:
        """The known metrics, the most important one first: a narrow terminal drops the last."""
        words = [f"epoch {self.epoch}"] if self.epoch else []
        if self.loss is not None:
            words.append(metric_text(tags.LOSS, self.loss))
        if self.accuracy is not None:
            words.append(metric_text(tags.TOP1, self.accuracy))
        if self.images_per_s:
            words.append(metric_text(tags.IMAGES_PER_S, self.images_per_s))
        if self.goodput is not None:
            words.append(f"goodput {self.goodput:.0%}")
        return words


@dataclass(frozen=True)
class TaskStart:
    """Where the current task started: the basis of the estimate of the time left."""

    done: int
    time: float  # of the display's clock


class Display:
    """Shows one stage at a time.

    Args:
        console: output; shows a live bar if it is a terminal.
        log_file: receives every line too, with the time in front.
        interval: seconds between two plain progress lines.
        clock: seconds, monotonic.
    """

    def __init__(
        self,
        console: Console,
        log_file: TextIO | None = None,
        interval: float = 10.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.console = console
        self._log_file = log_file
        self._log_fails = False
        self._interval = interval
        self._clock = clock
        self._stage = ""
        self._task: str | None = None
        self._task_start = TaskStart(done=0, time=0.0)
        self._last_line = -interval
        self._live: Live | None = None
        self._line: ProgressLine | PhaseLine = PhaseLine("", "", clock)

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Report progress under ``name`` while the context is open."""
        self._stage = name
        self._task = None
        self._last_line = -self._interval
        self.phase("starting")
        if not self.console.is_terminal:
            yield
            return
        live = Live(
            get_renderable=lambda: self._line,
            console=self.console,
            transient=True,
            refresh_per_second=_REFRESHES_PER_S,
            # Rich sends prints to the console, above the line. Beside a line on standard error,
            # they must stay on standard output: it may be a file.
            redirect_stdout=not self.console.stderr,
        )
        with live:
            self._live = live
            try:
                yield
            finally:
                self._live = None

    def phase(self, word: str) -> None:
        """Show ``word`` until the next progress: "starting", "loading", "compiling"."""
        self._line = PhaseLine(self._stage, word, self._clock)

    def progress(self, task: str, done: int, total: int, *details: str) -> None:
        """Report that ``done`` of ``total`` units of ``task`` are finished."""
        now = self._clock()
        # A count that falls is a new attempt at the same task: after a restart of the processes, or
        # when training resumes from a checkpoint. The old speed says nothing about it.
        if task != self._task or done < self._task_start.done:
            self._task = task
            self._task_start = TaskStart(done=done, time=now)
        label = f"{self._stage}: {task}" if task else self._stage
        left = self._time_left(done, total, now)
        self._line = ProgressLine(label=label, done=done, total=total, left=left, details=details)
        # Plain lines are rare, or they would fill log files. The last one of a task always appears.
        if now - self._last_line >= self._interval or done == total:
            self._last_line = now
            parts = (f"{label} {done}/{total}", *details, left)
            # With a live line, the plain one goes to the log file only.
            self._print("  ".join(part for part in parts if part), on_screen=self._live is None)

    def log(self, text: str, level: str = "info") -> None:
        """Print a message that stays on the screen; ``level`` is info, warning or error."""
        prefix = "" if level == "info" else f"{level}: "
        self._print(prefix + text, LEVEL_STYLES.get(level, ""))

    def _time_left(self, done: int, total: int, now: float) -> str:
        """Estimate from the speed since the task started, or '' while there is none.

        Example: 10 of 40 steps in the first 10 s -> (10 s / 10 steps) * 30 steps = "0:00:30 left".
        """
        start = self._task_start
        if done <= start.done or done >= total:
            return ""
        seconds = round((now - start.time) * (total - done) / (done - start.done))
        return f"{timedelta(seconds=seconds)} left"

    def _print(self, text: str, style: str = "", *, on_screen: bool = True) -> None:
        if on_screen:
            # markup=False: class names and paths may contain square brackets.
            self.console.print(text, style=style, markup=False, highlight=False, soft_wrap=True)
        if self._log_file is not None:
            now = time.strftime("%Y-%m-%d %H:%M:%S ")
            try:
                self._log_file.writelines(f"{now}{line}\n" for line in text.splitlines())
                self._log_file.flush()
            except OSError as error:  # the run matters more than its log
                if not self._log_fails:
                    self._log_fails = True
                    self.log(f"the log of the run cannot be written: {error}", "warning")
            else:
                self._log_fails = False


class DisplayFeed:
    """Feeds a display with the events that a stage appends to its event log.

    ``highest_step`` is the largest step seen. The supervisor compares it before and after a restart
    to tell whether the processes make progress. ``compiles``: the first steps of the stage compile
    the network, which takes minutes. ``goodput``: that of the run, which the events of a training
    stage are added to.
    """

    def __init__(
        self,
        events: Path,
        display: Display,
        *,
        compiles: bool = False,
        goodput: Goodput | None = None,
    ) -> None:
        self._follower = Follower(events, from_end=True)  # events of earlier attempts are history
        self._display = display
        self._first_steps = "compiling" if compiles else "loading"
        self._metrics = LatestMetrics()
        self._goodput = goodput
        self._stage = events.stem
        self.highest_step = 0

    def poll(self) -> None:
        """Show the events written since the last call."""
        for event in self._follower.poll():
            # Added before it is shown, so that the line has the share up to this event.
            if self._goodput is not None:
                self._goodput.add(event, self._stage)
                self._metrics.goodput = self._goodput.share
            self._show(event)

    def _show(self, event: Event) -> None:
        if event.kind == "message":
            self._display.log(event.text, event.level)
        elif event.kind == "start":
            # The processes run. Until the first metrics they load weights and images, or compile.
            self._display.phase(self._first_steps)
        elif event.kind == "evaluation":
            self._metrics.update(event)
            values = "  ".join(metric_text(tag, value) for tag, value in event.scalars.items())
            self._display.log(f"evaluation after step {event.step}: {values}")
        elif event.kind == "step":
            self._metrics.update(event)
            self.highest_step = max(self.highest_step, event.step)
            self._display.progress("", event.step, self._metrics.total, *self._metrics.in_words())


@contextlib.contextmanager
def polled_in_background(feed: DisplayFeed, interval: float = 0.5) -> Iterator[None]:
    """Poll in a thread, for a process whose main thread trains."""
    done = threading.Event()

    def loop() -> None:
        while not done.wait(interval):
            feed.poll()

    thread = threading.Thread(target=loop, name="display", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        feed.poll()  # events written after the thread's last poll
