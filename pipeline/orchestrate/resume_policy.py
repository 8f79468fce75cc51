"""Decides for one stage whether it runs, and whether it resumes or restarts from scratch.

The rules, in this order:

1. A stage that was never started is started.
2. A finished stage is skipped if its inputs, the settings that change its result, and its outputs
   are unchanged. With a damaged output it is repaired: it resumes, which writes that output again.
3. An unfinished stage resumes if its inputs and those settings are unchanged. Other settings (such
   as ``log_every_steps``) may change at any time, and some of preparation (such as ``min_side``)
   while it is unfinished: it applies them to what it has read (``Rules.keeps_work``).
4. If an input or such a setting has changed, the results cannot be kept. A stage whose work is
   cheap (evaluation, export, preparation of a finished dataset) restarts. A stage with work worth
   keeping, finished or not, is refused: only the user may discard it, with ``--force``.

Restarting moves earlier results aside. Nothing is deleted.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from pipeline.config.resume_diff import Change, changes
from pipeline.layout import RunDir
from pipeline.orchestrate.artifacts import stage_dirs
from pipeline.orchestrate.run_state import StageRecord

Action = Literal["skip", "start", "resume", "repair", "restart", "refuse"]

Resolved = Mapping[str, object]  # a whole job as plain values


@dataclass(frozen=True, kw_only=True)
class Decision:
    """What to do with a stage, and the reason in words for the user.

    ``differences``: what has changed, one line each. ``damaged``: outputs that a repair writes
    again, relative to the run directory.
    """

    action: Action
    reason: str
    differences: list[str] = field(default_factory=list)
    damaged: list[str] = field(default_factory=list)


def decide(
    stage: str,
    record: StageRecord,
    *,
    started_with: Resolved | None,
    resolved: Resolved,
    input_changes: Sequence[str] = (),
    damaged: Sequence[str] = (),
    at_stake: str = "",
) -> Decision:
    """Apply the rules above to one stage.

    Args:
        started_with: the resolved job with which the stage was started (``settings_of``), or None.
        resolved: the resolved job now.
        input_changes: the inputs that have changed since then, in words.
        damaged: outputs of the finished stage that are damaged.
        at_stake: the work that a restart would discard, in words; '' if it is cheap.
    """
    is_known = record.state != "pending" or bool(record.inputs)
    if started_with is None and not is_known:
        return Decision(action="start", reason="starting")
    # The user deleted the record of the settings, as the error about a damaged one suggests.
    changed = changes(started_with, resolved, stage) if started_with is not None else []
    is_done = record.state == "done"
    relevant = [
        change for change in changed if change.changes_result and (is_done or not change.keeps_work)
    ]
    differences = [*map(str, relevant), *input_changes]
    if differences:
        if at_stake:
            return Decision(action="refuse", reason=at_stake, differences=differences)
        reason = f"{'; '.join(differences)}; running again"
        return Decision(action="restart", reason=reason, differences=differences)
    if not is_done:
        reason = "failed last time" if record.state == "failed" else "interrupted"
        return Decision(action="resume", reason=f"{reason}, resuming{_with(changed)}")
    if damaged:
        reason = f"{damaged[0]} is missing or damaged, writing it again"
        return Decision(action="repair", reason=reason, damaged=list(damaged))
    return Decision(action="skip", reason="up to date")


def move_aside(run_dir: RunDir, stage: str) -> Path | None:
    """Move the results of a stage that restarts; returns their new folder, None if there are none.

    Two files of the stage need care:

    - the fence stays. It numbers the process groups of the stage, and a group of an earlier attempt
      may still be alive; if numbering began again at 0, that group could commit its results;
    - the settings that the stage was started with go last. If this function is cut short, the next
      call of the pipeline finds them, decides to restart as well, and moves the rest.
    """
    fence = run_dir.fence(stage)
    started_with = run_dir.started_with(stage)
    results = [path for path in _results(run_dir, stage) if path not in (fence, started_with)]
    if started_with.exists():
        results.append(started_with)
    if not results:
        return None
    target = _replaced(run_dir, stage)
    for path in results:
        new = target / path.relative_to(run_dir.path)
        new.parent.mkdir(parents=True, exist_ok=True)
        path.rename(new)
    return target


def _results(run_dir: RunDir, stage: str) -> list[Path]:
    """The folders and the event log of a stage that exist; its own folder file by file."""
    folder = run_dir.stage(stage)
    files = sorted(folder.iterdir()) if folder.is_dir() else []
    others = [path for path in stage_dirs(run_dir, stage) if path != folder]
    return [*files, *(path for path in [*others, run_dir.events(stage)] if path.exists())]


def set_aside(run_dir: RunDir, stage: str, damaged: Sequence[str]) -> None:
    """Move damaged outputs of a stage, so that the stage finds them missing and writes them."""
    for path in damaged:
        if (run_dir.path / path).exists():
            new = _replaced(run_dir, stage) / path
            new.parent.mkdir(parents=True, exist_ok=True)
            (run_dir.path / path).rename(new)


def _replaced(run_dir: RunDir, stage: str) -> Path:
    """The folder for results that are moved now.

    Its layout is that of the run directory, so that they can be put back.
    """
    return run_dir.replaced / f"{time.strftime('%Y%m%d-%H%M%S')}-{stage}"


def _with(changed: Sequence[Change]) -> str:
    """Example: " with seed 0 -> 1; model.columns 4 -> 5"."""
    return f" with {'; '.join(map(str, changed))}" if changed else ""
