"""Records the metrics of a running stage: in the event log, and in TensorBoard where possible."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from pipeline.layout import RunDir
from pipeline.monitor.events import EventWriter
from pipeline.monitor.goodput import Goodput
from pipeline.monitor.tensorboard import TRAINED, Board, Hparam
from pipeline.monitor.trained_on import TrainedOn


class Recorder:
    """Metrics of one stage. Only rank 0 has one.

    Args:
        run_dir: the recorder writes ``run_dir.events(stage)`` and ``run_dir.tensorboard(stage)``.
        stage: name of the stage.
        trained: training stages of the job; TensorBoard has charts for their losses.
        resume_step: optimizer steps in the checkpoint from which training resumes (0: from
            scratch). Anything recorded for later steps becomes invalid.
        trained_on: for a later comparison with the forecast.
    """

    def __init__(
        self,
        run_dir: RunDir,
        stage: str,
        *,
        trained: Sequence[str] = tuple(TRAINED),
        resume_step: int = 0,
        trained_on: TrainedOn | None = None,
    ) -> None:
        self._step = resume_step
        self._stage = stage
        self._goodput = Goodput.of(run_dir, trained)
        self._events = EventWriter(run_dir.events(stage))
        # Readers of the event log drop all later steps when they meet this event; TensorBoard does
        # the same with purge_step.
        start = self._events.write(
            "start",
            resume_step,
            scalars=trained_on.scalars() if trained_on else None,
            text=trained_on.device if trained_on else "",
        )
        self._goodput.add(start, stage)
        purge_step = resume_step + 1 if resume_step else None
        self._board = Board(
            run_dir.tensorboard(stage),
            stage,
            trained=trained,
            purge_step=purge_step,
            warn=self._log_warning,
        )

    def step(
        self,
        step: int,
        total_steps: int,
        epoch: int,
        scalars: dict[str, float],
        seconds: dict[str, float] | None = None,
    ) -> None:
        """Record the metrics after optimizer step ``step`` of ``total_steps``; both, and ``epoch``,
        count from 1.

        Args:
            seconds: where the time since the last call went, by part of the goodput.
        """
        self._step = step
        event = self._events.write(
            "step", step, total=total_steps, epoch=epoch, scalars=scalars, seconds=seconds
        )
        # TensorBoard alone gets the shares: the event log has the seconds that they follow from.
        self._goodput.add(event, self._stage)
        self._board.scalars(step, scalars | self._goodput.scalars())

    def evaluation(self, step: int, scalars: dict[str, float]) -> None:
        """Record the metrics on the validation split, with the weights after ``step``."""
        self._events.write("evaluation", step, scalars=scalars)
        self._board.scalars(step, scalars)
        self._board.flush()

    def image(self, tag: str, step: int, image: NDArray[np.uint8]) -> None:
        """Show a picture in TensorBoard: uint8, shape (H, W, 3)."""
        self._board.image(tag, step, image)

    def job(self, text: str) -> None:
        """Show the resolved job, in YAML, in TensorBoard."""
        self._board.text("job", self._step, f"```yaml\n{text}```\n")

    def hparams(self, values: Mapping[str, Hparam], compared: Sequence[str]) -> None:
        """Show hyperparameters in TensorBoard, see `Board.hparams`."""
        self._board.hparams(values, compared)

    def message(self, text: str, level: str = "info") -> None:
        """Log a message for the user; ``level`` is info, warning or error."""
        self._events.write("message", self._step, text=text, level=level)

    def close(self, seconds: dict[str, float] | None = None, step: int | None = None) -> None:
        """End the stage. ``seconds``: as in ``step``; ``step``: the last one, if not logged."""
        self._events.write("end", self._step if step is None else step, seconds=seconds)
        self._board.close()
        self._events.close()

    def _log_warning(self, text: str) -> None:
        self.message(text, "warning")
