"""What rank 0 writes down while a stage runs: the event log (always) and TensorBoard (if it can)."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from pipeline.layout import RunDir
from pipeline.monitor.events import EventWriter
from pipeline.monitor.tensorboard import Board


class Recorder:
    """Metrics of one stage. Used by rank 0 only.

    Args:
        run_dir: the run's directory; ``logs/<stage>.jsonl`` and ``tensorboard/<stage>/`` are written in it.
        stage: name of the stage.
        resume_step: optimizer steps already done by the checkpoint that training goes on from; what was recorded for
            later steps no longer counts.
    """

    def __init__(self, run_dir: RunDir, stage: str, *, resume_step: int = 0) -> None:
        self._step = resume_step
        self._events = EventWriter(run_dir.events(stage))
        self._events.write("start", resume_step)
        purge = resume_step + 1 if resume_step else None
        self._board = Board(run_dir.tensorboard(stage), purge_step=purge, warn=self._warn)

    def step(self, step: int, total_steps: int, epoch: int, scalars: dict[str, float]) -> None:
        """Figures after optimizer step ``step`` (counted from 1) of ``total_steps``."""
        self._step = step
        self._events.write("step", step, total=total_steps, epoch=epoch, scalars=scalars)
        self._board.scalars(step, scalars)

    def evaluation(self, step: int, scalars: dict[str, float]) -> None:
        """Figures on the validation split with the weights after ``step``."""
        self._events.write("evaluation", step, scalars=scalars)
        self._board.scalars(step, scalars)
        self._board.flush()

    def images(self, tag: str, step: int, images: NDArray[np.uint8]) -> None:
        """A grid of images, uint8 (n, H, W, 3)."""
        self._board.images(tag, step, images)

    def hparams(self, values: dict[str, str | float | bool], metrics: dict[str, float]) -> None:
        """Settings and final figures, for TensorBoard's comparison of runs."""
        self._events.write("hparams", self._step, scalars=metrics)
        self._board.hparams(values, metrics)

    def message(self, text: str, level: str = "info") -> None:
        """A sentence for the user; ``level`` is info, warning or error."""
        self._events.write("message", self._step, text=text, level=level)

    def close(self) -> None:
        self._board.close()
        self._events.close()

    def _warn(self, text: str) -> None:
        self.message(text, "warning")
