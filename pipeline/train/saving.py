"""When and how a training stage saves: behind the steps, with one message per checkpoint."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass, field

from pipeline.checkpoint.background import BackgroundWriter, WriteReport
from pipeline.checkpoint.manifest import directory_of, step_of
from pipeline.checkpoint.retention import Retention
from pipeline.errors import CheckpointError, StageError
from pipeline.evaluate.metrics import TOP1
from pipeline.reporting import Log
from pipeline.train.checkpointing import owned_ranges
from pipeline.train.context import StageContext
from pipeline.train.fence import Fence
from pipeline.train.selection import Selection
from pipeline.train.training_state import TrainingState
from pipeline.train.zero_state import ShardedState


@dataclass(kw_only=True)
class CheckpointSaver:
    """Saves the checkpoints of a stage. All ranks make the same calls.

    ``every``: interval between regular checkpoints (steps). ``selection``: the split that chooses
    the best checkpoint; None: the validation split."""

    context: StageContext
    sharded: ShardedState
    every: int
    selection: Selection | None
    fence: Fence
    log: Log
    _writer: BackgroundWriter = field(init=False)
    _paused_s: float = field(init=False, default=0.0)  # of the training, for the newest checkpoint

    def __post_init__(self) -> None:
        self._writer = BackgroundWriter(
            pin_memory=self.context.device.type == "cuda",
            may_commit=self.fence.may_commit,
        )

    def save(self, done: int, state: TrainingState) -> None:
        """Begin to write the checkpoint after step ``done``. Training may continue at once."""
        started = time.monotonic()
        # The state in words is taken now, too: evaluations are appended to it while it is written.
        target = directory_of(self.context.checkpoints, done)
        owned = owned_ranges(self.sharded)
        self._writer.start(target, owned, state.to_json(), self._retention(state))
        self.report()  # on the one before, which has ended by now
        self._paused_s = time.monotonic() - started

    def capture(self, done: int, state: TrainingState) -> None:
        """Begin to write the state after step ``done`` for a replay, apart from checkpoints."""
        target = directory_of(self.context.run_dir.captures(self.context.stage), done)
        # No retention: it belongs to a step that somebody will want to look at.
        everything = Retention(last=sys.maxsize)
        self._writer.start(target, owned_ranges(self.sharded), state.to_json(), everything)
        self.report()

    def report(self) -> None:
        """Log the checkpoints that were completed, and those that could not be written.

        Raises:
            StageError: on rank 0, if a newer group of processes has replaced this one, or nobody
                knows whether it has.
        """
        for report in self._reports():
            self._log_report(report)

    def finish(self, *, needed: bool) -> None:
        """Wait until the newest checkpoint is complete.

        Args:
            needed: the stage cannot end without it.

        Raises:
            CheckpointError: on all ranks, if it is needed and cannot be written.
            StageError: see `report`.
        """
        self._writer.wait()
        reports = self._reports()
        for report in reports:
            if needed and report.final and report.failure is not None:
                raise CheckpointError(
                    f"the final checkpoint cannot be written: {report.failure}",
                    place=str(self.context.checkpoints),
                    remedy="free some disk space, or mount the run directory on every machine; "
                    "then rerun the same command: it resumes from the checkpoint before",
                )
            self._log_report(report)

    def abandon(self) -> None:
        """The stage has failed: end the thread that writes."""
        self._writer.abandon()

    def _reports(self) -> list[WriteReport]:
        try:
            return self._writer.reports()
        except StageError:
            # The commit was refused: by a newer group, or because the generation file is missing.
            self.fence.require_file()
            raise

    def _log_report(self, report: WriteReport) -> None:
        step = step_of(report.target)
        if report.target.parent != self.context.checkpoints:
            outcome = report.failure or "written"
            self.log(f"state before step {step + 1}, for a replay: {outcome}")
        elif report.failure is None:
            self.log(
                f"checkpoint at step {step} written: {report.bytes / 1e6:,.1f} MB per "
                f"process in {report.seconds:.1f} s, training paused for {self._paused_s:.2f} s"
            )
        else:
            following = "the one before stays the newest" if report.final else "trying again"
            self.log(
                f"checkpoint at step {step} could not be written, training continues: "
                f"{report.failure}; {following}",
                "warning",
            )

    def _retention(self, state: TrainingState) -> Retention:
        # Decided with the state at the time of the checkpoint: evaluations come later, too.
        keep = self.context.config.keep_checkpoints
        metric = TOP1 if self.selection is None else self.selection.metric
        scores = {
            int(scores["step"]): scores[metric] for scores in state.evaluations if metric in scores
        }
        return Retention(
            last=keep.last,
            regular=self.every,
            final=self.context.total_steps,
            every_steps=keep.every_steps,
            scores=scores if keep.best else {},
        )
