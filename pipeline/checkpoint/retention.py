"""Which checkpoints of a stage stay: the newest, one per interval, the best, and pinned ones."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pipeline.checkpoint.manifest import list_checkpoints


@dataclass(frozen=True, kw_only=True)
class Retention:
    """What to keep.

    ``last``: number of newest regular checkpoints. Those of a stop request are not: they stay until
    a newer one is complete, so that a run keeps the same ones whether it was stopped or not.
    ``regular``: interval between regular checkpoints (steps). ``final``: the last step of the
    stage, whose checkpoint is a regular one too. ``every_steps``: of each interval of so many steps
    the first one too (0: none). ``scores``: accuracy by step; the best of the checkpoints that have
    one stays, of equal ones the latest. Empty: none stays for its accuracy.

    Example: last 2, every_steps 1000, checkpoints every 400 steps, the best of them 800: after step
    2400 there are 800 (the best), 1200 (first of [1000, 2000)), 2000 (first of [2000, 3000)) and
    2400.
    """

    last: int
    regular: int = 1
    final: int = 0
    every_steps: int = 0
    scores: Mapping[int, float] = field(default_factory=dict)

    def kept(self, steps: Sequence[int]) -> set[int]:
        """The steps whose checkpoints stay, of all those that exist."""
        ordered = sorted(steps)
        regular = [step for step in ordered if step % self.regular == 0 or step == self.final]
        kept = {*regular[-self.last :], *ordered[-1:]}
        if self.every_steps:
            first: dict[int, int] = {}
            for step in regular:
                first.setdefault(step // self.every_steps, step)
            # The interval from step 0 on has no checkpoint to begin with.
            kept |= {step for interval, step in first.items() if interval}
        scored = [step for step in ordered if step in self.scores]
        if scored:
            kept.add(max(scored, key=lambda step: (self.scores[step], step)))
        return kept


def delete_others(root: Path, retention: Retention) -> None:
    """Delete the checkpoints of a stage that need not stay. Raises OSError."""
    checkpoints = list_checkpoints(root)
    kept = retention.kept([step for step, _ in checkpoints])
    for step, path in checkpoints:
        if step not in kept:
            delete_checkpoint(path)


def delete_checkpoint(directory: Path) -> None:
    """Delete a checkpoint, at once for whoever lists them. Raises OSError."""
    # Rename first: deleting takes time, and a crash in between must not leave a directory that
    # looks like a checkpoint but lacks files. The hidden name counts as a leftover.
    hidden = directory.with_name(f".{directory.name}.deleted")
    directory.rename(hidden)
    shutil.rmtree(hidden, ignore_errors=True)
