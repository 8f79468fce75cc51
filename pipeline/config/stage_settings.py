"""The record of the settings that a stage was started with: the whole job, as plain values."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping

from pipeline.config.yaml_tree.old_names import migrate_renamed
from pipeline.errors import StageError
from pipeline.files import DIGEST, matches_digest, with_digest, write_json
from pipeline.layout import RunDir


def settings_of(run_dir: RunDir, stage: str) -> dict[str, object] | None:
    """The resolved job with which a stage was started; None if it never was.

    Raises:
        StageError: the record of it is damaged.
    """
    path = run_dir.started_with(stage)
    try:
        settings = json.loads(path.read_text())
        if not isinstance(settings, dict):
            raise ValueError("not a JSON object")
        # Earlier versions wrote no digest.
        if not matches_digest(settings):
            raise ValueError("checksum mismatch: it changed after it was written")
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise StageError(
            f"is damaged ({error}): the settings that {stage} was started with are unknown",
            place=str(path),
            remedy="if they are those of the job now, delete the record with "
            f"`rm {shlex.quote(str(path))}` and rerun the same command; to start from scratch "
            f"instead, rerun it with --stage {stage} --force",
        ) from None
    settings.pop(DIGEST, None)
    return migrate_renamed(settings)


def keep_settings(run_dir: RunDir, stage: str, resolved: Mapping[str, object]) -> None:
    """Store the resolved job with which a stage is started."""
    write_json(run_dir.started_with(stage), with_digest(resolved))
