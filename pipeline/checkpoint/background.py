"""Writes checkpoints behind the training: it waits for a copy to the host only.

A checkpoint costs the training the time of that copy. Digests, writing, and the commit happen in a
thread, in step with the threads of the other ranks. One checkpoint is written at a time: the next
one waits until the one before has ended.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch.distributed as dist

from pipeline.checkpoint.manifest import LoopState
from pipeline.checkpoint.rank_file import HostCopy, Owned
from pipeline.checkpoint.retention import Retention
from pipeline.checkpoint.writer import CheckpointWriter

# Pauses between attempts to write one checkpoint. A disk is freed, or a mount comes back.
PAUSES_S = (1.0, 5.0, 15.0)
_ABANDON_S = 5.0  # of a write that is under way when the training fails


@dataclass(frozen=True, kw_only=True)
class WriteReport:
    """How an attempt to write a checkpoint ended.

    ``failure``: None if it is complete. ``final``: no attempt follows. ``seconds``: since the copy
    was complete. ``bytes``: of this rank's file.
    """

    target: Path
    failure: str | None
    final: bool
    seconds: float
    bytes: int


class BackgroundWriter:
    """One rank's part in writing the checkpoints of a stage. Every rank makes the same calls.

    Args:
        pin_memory: the state is on a GPU.
        may_commit: see CheckpointWriter.
    """

    def __init__(self, *, pin_memory: bool, may_commit: Callable[[], bool]) -> None:
        group = dist.new_group(backend="gloo")
        self._writer = CheckpointWriter(group=group, may_commit=may_commit)
        self._copy = HostCopy(dist.get_rank(), pin_memory=pin_memory)
        self._thread: threading.Thread | None = None
        self._reports: queue.SimpleQueue[WriteReport | Exception] = queue.SimpleQueue()
        self._give_up = threading.Event()

    def start(
        self, target: Path, owned: Iterable[Owned], state: LoopState, retention: Retention
    ) -> None:
        """Copy this rank's ranges and begin to write the checkpoint directory ``target``.

        Waits for the attempt under way to write the one before; that one is not tried again.

        Args:
            state: of the training loop.
            retention: which checkpoints beside the new one stay.
        """
        # 1. End the one before. Rank 0 decides for all whether another attempt follows, so its flag
        #    alone counts.
        self._give_up.set()
        self.wait()
        self._give_up.clear()
        # 2. The only part that the training waits for.
        self._copy.take(owned)
        # A daemon: a thread that hangs with its peers gone must not keep the process.
        self._thread = threading.Thread(
            target=self._run, args=(target, state, retention), name="checkpoint", daemon=True
        )
        self._thread.start()

    def wait(self) -> None:
        """Wait until the checkpoint that is being written is complete, or given up."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def abandon(self) -> None:
        """Training has failed. A write that is almost done may still end, any other is lost."""
        self._give_up.set()
        if self._thread is not None:
            self._thread.join(_ABANDON_S)

    def reports(self) -> list[WriteReport]:
        """The attempts that have ended since the last call.

        Raises:
            StageError: on rank 0, if a newer process group has replaced this one.
            Exception: a rank was lost, or a bug.
        """
        reports = []
        while not self._reports.empty():
            report = self._reports.get()
            if isinstance(report, Exception):
                raise report
            reports.append(report)
        return reports

    def _run(self, target: Path, state: LoopState, retention: Retention) -> None:
        started = time.monotonic()
        try:
            for pause in (*PAUSES_S, None):
                failure = self._writer.save(target, self._copy, state, retention)
                final = failure is None or pause is None
                report = WriteReport(
                    target=target,
                    failure=failure,
                    final=final,
                    seconds=time.monotonic() - started,
                    bytes=self._copy.bytes,
                )
                self._reports.put(report)
                if final or pause is None or self._given_up(pause):
                    return
        except Exception as error:  # raised where the training looks for reports
            self._reports.put(error)

    def _given_up(self, pause: float) -> bool:
        """Wait for the next attempt; True if there is none. Rank 0 decides. Collective."""
        # The pause of the other ranks is the wait for this message.
        given_up = [False]
        if dist.get_rank() == 0:
            given_up = [self._give_up.wait(pause)]
        dist.broadcast_object_list(given_up, src=0, group=self._writer.group)
        return given_up[0]
