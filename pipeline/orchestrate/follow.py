"""Follows a run on a cluster: shows the driver's output until the job ends."""

from __future__ import annotations

import re
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from types import FrameType

from rich.console import Console
from rich.status import Status

from pipeline.cluster.launcher import JobState
from pipeline.errors import ConfigError, Detached
from pipeline.orchestrate.cluster_run import ClusterRun, exit_code, how_to_return

_SHORTEST_POLL_S = 1.0
_LONGEST_POLL_S = 10.0
_PAUSE_PER_ANSWER = 5.0  # times the seconds that the cluster took to answer
_LAST_LINES = 10  # shown of the output before this command
_PATIENCE_S = 120.0  # while the cluster does not answer
# A line of progress in the output of a driver: "pretrain 120/400  epoch 2  0:01:30 left".
PROGRESS = re.compile(r"(?P<stage>\w+)(: .*)? (?P<step>\d+/\d+)(  .*?((?P<left>[\d:]+) left)?)?")


def follow(run: ClusterRun, console: Console, *, from_start: bool) -> int:
    """Show the driver's output until the job ends; returns the exit code of the run.

    Args:
        from_start: show all of the output of the job, not only its last lines and what follows.

    Raises:
        Detached: Ctrl-C, or this process is asked to end. The run continues.
        ConfigError: the cluster has not answered for minutes.
    """
    try:
        with _signals_detach():
            return _Follower(run, console).run(from_start)
    except KeyboardInterrupt:
        raise Detached(
            f"detached from {run.where}, which continues", remedy=how_to_return(run.run_dir)
        ) from None


class _Follower:
    def __init__(self, run: ClusterRun, console: Console) -> None:
        self._run = run
        self._console = console
        self._launcher = run.launcher
        self._offset = run.record.log_start
        self._rest = b""  # a line that is not complete yet
        self._waiting_for = ""

    def run(self, from_start: bool) -> int:
        answered = time.monotonic()
        if not from_start and self._run.state().phase != "pending":
            self._show_last_lines()
        with self._status() as status:
            while True:
                asked = time.monotonic()
                try:
                    state = self._run.state()
                    if state.phase != "pending":
                        self._show_output(status)
                    answered = time.monotonic()
                except ConfigError:
                    # A network that fails for a moment must not end what follows for days.
                    if time.monotonic() - answered > _PATIENCE_S:
                        raise
                else:
                    self._show_waiting(state)
                    if not state.under_way:
                        # The driver may have written between the two questions.
                        self._show_output(status, last=True)
                        break
                # An answer may be as large as the output, or take a step of a batch job.
                pause = max(_SHORTEST_POLL_S, _PAUSE_PER_ANSWER * (time.monotonic() - asked))
                time.sleep(min(pause, _LONGEST_POLL_S))
        code = exit_code(self._run, state)
        if code:
            word = f": {state.reason}" if state.reason else ""
            self._print(f"{self._run.where} ended with exit code {code}{word}")
        return code

    def _show_last_lines(self) -> None:
        # Who comes back wants to know where the run is, not how it came there.
        output = self._read()
        lines = output.splitlines(keepends=True)
        self._rest = b""
        for line in lines[-_LAST_LINES:]:
            self._print(line.decode(errors="replace").rstrip("\n"))

    def _read(self) -> bytes:
        record = self._run.record
        output = self._launcher.log(record.id, record.run_dir.path, self._offset)
        self._offset += len(output)
        return output

    def _show_output(self, status: Status | None, *, last: bool = False) -> None:
        *lines, self._rest = (self._rest + self._read()).split(b"\n")
        if last and self._rest:
            lines.append(self._rest)
        for line in lines:
            text = line.decode(errors="replace").rstrip("\r")
            if status is not None and PROGRESS.fullmatch(text):
                # On a terminal, the newest one replaces the one before.
                status.update(text)
            else:
                self._print(text)

    def _show_waiting(self, state: JobState) -> None:
        """Report why a job waits, whenever the reason changes."""
        if state.phase != "pending" or not (state.reason or state.expected_start):
            self._waiting_for = ""
            return
        text = f"{self._run.where} waits: {waiting_text(state)}"
        if text != self._waiting_for:
            self._waiting_for = text
            self._print(text)

    @contextmanager
    def _status(self) -> Iterator[Status | None]:
        if not self._console.is_terminal:
            yield None
            return
        with self._console.status("", spinner="dots") as status:
            yield status

    def _print(self, text: str) -> None:
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)


def waiting_text(state: JobState) -> str:
    """Why a job waits and until when: "Resources, expected start 2026-01-31 14:05"."""
    reason = state.reason or "for its turn"
    if state.expected_start is None:
        return reason
    start = datetime.fromtimestamp(state.expected_start)
    return f"{reason}, expected start {start:%Y-%m-%d %H:%M}"


@contextmanager
def _signals_detach() -> Iterator[None]:
    """While open, the end of the terminal or of the session detaches as Ctrl-C does."""

    def detach(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    numbers = [
        number
        for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)
        if signal.getsignal(number) is not signal.SIG_IGN
    ]
    handlers = {number: signal.signal(number, detach) for number in numbers}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
