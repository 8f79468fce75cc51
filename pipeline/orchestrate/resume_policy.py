"""Which stages have to run, and from where. The rules, in order:

1. A stage that is done is skipped if its inputs, its settings and its outputs are unchanged.
2. A stage that is done and has changed is begun anew; what it had made is moved aside, never deleted.
3. A stage that was interrupted goes on, if what has changed since may change midway; else the run is refused.
4. A stage whose inputs have changed is begun anew, whatever its state.
5. ``--force`` begins a stage anew.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pipeline.config.resume_diff import Change, changes
from pipeline.config.yaml_tree.old_names import migrate_renamed
from pipeline.errors import ConfigError
from pipeline.files import write_json
from pipeline.layout import RunDir
from pipeline.orchestrate.artifacts import NOT_THERE, stage_dirs
from pipeline.orchestrate.run_state import StageRecord

Action = Literal["skip", "begin", "resume", "anew"]


@dataclass(frozen=True)
class Decision:
    """What to do with a stage and why (a phrase for the user)."""

    action: Action
    reason: str


def decide(
    stage: str,
    record: StageRecord,
    begun_with: Mapping[str, Any] | None,
    resolved: Mapping[str, Any],
    inputs: Mapping[str, str],
    run_dir: RunDir,
    *,
    force: bool = False,
) -> Decision:
    """Apply the rules above to one stage.

    Args:
        begun_with: the resolved job that the stage was begun with (``settings_of``), or None.
        resolved: the resolved job now.
        inputs: digests now.

    Raises:
        ConfigError: an interrupted stage was begun with settings that may not change midway.
    """
    if begun_with is None:
        return Decision("begin", "was never run")
    if force:
        return Decision("anew", "begun anew by --force")
    changed_inputs = [name for name, digest in inputs.items() if _differs(record, name, digest)]
    if changed_inputs:
        return Decision("anew", f"its input has changed: {', '.join(changed_inputs)}")
    found = changes(begun_with, resolved, stage)
    refused = [change for change in found if not change.allowed]
    if record.state == "done":
        if refused:
            return Decision(
                "anew",
                "its settings have changed: " + "; ".join(_words(change) for change in refused),
            )
        damaged = [
            path
            for path, artifact in record.outputs.items()
            if not artifact.matches(run_dir.path / path)
        ]
        if damaged:
            return Decision("resume", f"{damaged[0]} is missing or was changed")
        return Decision("skip", "done, nothing has changed")
    if refused:
        listed = "\n".join(f"    {change}" for change in found)
        remedy = f"put them back, or give the job another name, or begin the stage anew: --stage {stage} --force"
        cause = f"it was interrupted, and its settings have changed since:\n{listed}"
        raise ConfigError(cause, place=f"stages.{stage}", remedy=remedy)
    changed = f" with {'; '.join(_words(change) for change in found)}" if found else ""
    why = {
        "failed": "failed last time",
        "running": "was interrupted",
        "pending": "was interrupted",
    }[record.state]
    return Decision("resume", f"{why}, goes on{changed}")


def settings_of(run_dir: RunDir, stage: str) -> dict[str, Any] | None:
    """The resolved job that a stage was begun with; None if it never was."""
    try:
        value: dict[str, Any] = json.loads(run_dir.started_with(stage).read_text())
    except FileNotFoundError:
        return None
    return migrate_renamed(value)


def keep_settings(run_dir: RunDir, stage: str, resolved: Mapping[str, Any]) -> None:
    """Remember what a stage is begun with."""
    write_json(run_dir.started_with(stage), resolved)


def move_aside(run_dir: RunDir, stage: str) -> Path | None:
    """Clear the way for a stage that is begun anew; returns where its earlier results are now, if there were any."""
    present = [
        path for path in [*stage_dirs(run_dir, stage), run_dir.events(stage)] if path.exists()
    ]
    if not present:
        return None
    target = run_dir.replaced / f"{time.strftime('%Y%m%d-%H%M%S')}-{stage}"
    for path in present:
        new = target / path.relative_to(run_dir.path)
        new.parent.mkdir(parents=True, exist_ok=True)
        path.rename(new)
    return target


def _differs(record: StageRecord, name: str, digest: str) -> bool:
    if record.state == "done" and digest == NOT_THERE:
        return False  # a source that was unmounted since is not needed any more
    return record.inputs.get(name, digest) != digest


def _words(change: Change) -> str:
    return f"{change.key} {json.dumps(change.old)} -> {json.dumps(change.new)}"
