"""Decides which stages run, and whether they resume or restart from scratch.

The rules, in this order:

1. A stage that was never started is started.
2. ``--force``: the stage restarts from scratch.
3. A stage whose inputs have changed restarts from scratch, whatever its state.
4. A finished stage is skipped if its settings and its outputs are unchanged. With other settings it
   restarts from scratch; with a damaged output it resumes, which produces the output again.
5. An interrupted or failed stage resumes, if only settings have changed since that may change
   during a stage (such as ``log_every_steps``). With any other change the run is refused.

Restarting moves earlier results aside. Nothing is deleted.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pipeline.config.resume_diff import Change, changes
from pipeline.config.yaml_tree.old_names import migrate_renamed
from pipeline.errors import ConfigError
from pipeline.files import write_json
from pipeline.layout import RunDir
from pipeline.orchestrate.artifacts import NOT_THERE, stage_dirs
from pipeline.orchestrate.run_state import StageRecord

Action = Literal["skip", "start", "resume", "restart"]

Resolved = Mapping[str, object]  # a whole job as plain values


@dataclass(frozen=True)
class Decision:
    """What to do with a stage, and the reason in words for the user."""

    action: Action
    reason: str


def decide(
    stage: str,
    record: StageRecord,
    *,
    started_with: Resolved | None,
    resolved: Resolved,
    inputs: Mapping[str, str],
    run_dir: RunDir,
    force: bool = False,
) -> Decision:
    """Apply the rules above to one stage.

    Args:
        started_with: the resolved job with which the stage was started (``settings_of``), or None.
        resolved: the resolved job now.
        inputs: digests of the inputs now.

    Raises:
        ConfigError: the stage was interrupted, and a setting has changed that must not.
    """
    # Rules 1 and 2.
    if started_with is None:
        return Decision("start", "starting")
    if force:
        return Decision("restart", "restarting from scratch (--force)")
    # Rule 3. This includes interrupted stages: their first half has used the old data.
    changed_inputs = [name for name, digest in inputs.items() if _differs(record, name, digest)]
    if changed_inputs:
        names = ", ".join(changed_inputs)
        return Decision("restart", f"input changed ({names}), restarting from scratch")
    # Rule 4.
    changed = changes(started_with, resolved, stage)
    refused = [change for change in changed if not change.allowed]
    if record.state == "done":
        return _decide_finished(record, refused, run_dir)
    # Rule 5. A restart would discard days of training, perhaps because of a typing error: refuse,
    # and let the user decide.
    if refused:
        listed = "\n".join(f"    {change}" for change in changed)
        raise ConfigError(
            f"it was interrupted, and its settings have changed since:\n{listed}",
            place=f"stages.{stage}",
            remedy="restore the settings, give the job another name, or restart the stage from "
            f"scratch: --stage {stage} --force",
        )
    reason = "failed last time" if record.state == "failed" else "interrupted"
    return Decision("resume", f"{reason}, resuming{_with(changed)}")


def _decide_finished(record: StageRecord, refused: list[Change], run_dir: RunDir) -> Decision:
    if refused:
        return Decision("restart", f"restarting from scratch{_with(refused)}")
    damaged = [
        path
        for path, artifact in record.outputs.items()
        if not artifact.matches(run_dir.path / path)
    ]
    if damaged:
        return Decision("resume", f"{damaged[0]} is missing or was modified, resuming")
    return Decision("skip", "up to date")


def settings_of(run_dir: RunDir, stage: str) -> dict[str, object] | None:
    """The resolved job with which a stage was started; None if it never was."""
    try:
        settings: dict[str, object] = json.loads(run_dir.started_with(stage).read_text())
    except FileNotFoundError:
        return None
    return migrate_renamed(settings)


def keep_settings(run_dir: RunDir, stage: str, resolved: Resolved) -> None:
    """Store the resolved job with which a stage is started."""
    write_json(run_dir.started_with(stage), resolved)


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
    # The layout below the new folder is that of the run directory, so that results can be put back.
    target = run_dir.replaced / f"{time.strftime('%Y%m%d-%H%M%S')}-{stage}"
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


def _differs(record: StageRecord, name: str, digest: str) -> bool:
    # The source of a finished stage is not needed any more, so it may be unmounted.
    if record.state == "done" and digest == NOT_THERE:
        return False
    return record.inputs.get(name, digest) != digest


def _with(changed: list[Change]) -> str:
    """Example: " with seed 0 -> 1; model.columns 4 -> 5"."""
    if not changed:
        return ""
    settings = (
        f"{change.key} {json.dumps(change.old)} -> {json.dumps(change.new)}" for change in changed
    )
    return f" with {'; '.join(settings)}"
