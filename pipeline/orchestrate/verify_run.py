"""Compares the files of a run with the digests that were recorded when they were written.

    run state       run.json with its own digest; each job.json with that in run.json
    results         what a finished stage has written, with the digests in run.json
    checkpoints     with the digests in their manifests

Prepared shards have digests of their own (`pipeline.prepare.verify`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pipeline.checkpoint.manifest import Manifest, list_checkpoints
from pipeline.command import command
from pipeline.config.job_queries import TRAINING
from pipeline.errors import CheckpointError, StageError
from pipeline.files import file_digest, matches_digest_line
from pipeline.layout import CLASSES_JSON, DATASET_JSON, RunDir
from pipeline.orchestrate.run_state import RunStateRecord, read_run_state

MISMATCH = "checksum mismatch: the file changed after it was written"
MISSING = "is missing"


@dataclass(frozen=True)
class Damage:
    """A file (or row of one) that is not as it was written."""

    place: str
    cause: str
    remedy: str


@dataclass(frozen=True)
class VerifiedPart:
    """Files of a run that belong together, and those of them that are damaged."""

    name: str
    damages: list[Damage]


def verify_parts(run_dir: RunDir) -> Iterator[VerifiedPart]:
    """Every part of a run but the shards of its datasets, each after its verification."""
    record: RunStateRecord | None = None
    damages: list[Damage] = []
    try:
        record = read_run_state(run_dir)
    except StageError as error:
        damages.append(Damage(str(run_dir.run_json), error.cause, _restore_state()))
    if run_dir.run_yaml.is_file() and not matches_digest_line(
        run_dir.run_yaml.read_text(errors="replace")
    ):
        remedy = "rerun the job file that the run came from, which writes it again"
        damages.append(Damage(str(run_dir.run_yaml), MISMATCH, remedy))
    damages += _changed_settings(run_dir, record)
    yield VerifiedPart("run state", damages)
    for stage, state in (record.stages if record is not None else {}).items():
        digests = {path: artifact.digest for path, artifact in state.outputs.items()}
        if state.state == "done" and digests:
            yield VerifiedPart(
                f"results of {stage}", list(_changed_results(run_dir, stage, digests))
            )
    for stage in TRAINING:
        for name, root in (
            ("checkpoint", run_dir.checkpoints(stage)),
            ("capture", run_dir.captures(stage)),
        ):
            for _, directory in list_checkpoints(root):
                damages = list(_changed_checkpoint(directory))
                # A run that is under way deletes its old checkpoints meanwhile.
                if directory.exists():
                    yield VerifiedPart(f"{name} {directory.name} of {stage}", damages)


def rerun(run_dir: RunDir, stage: str) -> str:
    """The remedy for damaged results of a stage: named with --stage, it writes them again."""
    again = command("run", run_dir.run_yaml, "--run-dir", run_dir.path)
    return f"{again} --stage {stage}"


def _restore_state() -> str:
    return "restore a copy, or move the run directory away to start a new run"


def _changed_settings(run_dir: RunDir, record: RunStateRecord | None) -> Iterator[Damage]:
    """Stages whose recorded settings are not those that they were started with."""
    for stage, state in (record.stages if record is not None else {}).items():
        path = run_dir.started_with(stage)
        if state.settings and _digest(path) != state.settings:
            cause = MISMATCH if path.exists() else MISSING
            yield Damage(
                str(path), cause, f"restore a copy, or remove it, then {rerun(run_dir, stage)}"
            )


def _changed_results(run_dir: RunDir, stage: str, digests: dict[str, str]) -> Iterator[Damage]:
    for relative, digest in digests.items():
        path = run_dir.path / relative
        if stage == "prepare" and path.name not in (DATASET_JSON, CLASSES_JSON):
            continue  # a shard or its index
        actual = _digest(path)
        if actual != digest:
            cause = MISMATCH if actual else MISSING
            yield Damage(str(path), cause, rerun(run_dir, stage))


def _changed_checkpoint(directory: Path) -> Iterator[Damage]:
    remedy = f"delete {directory}: training resumes from the checkpoint before"
    try:
        manifest = Manifest.read(directory)
    except CheckpointError as error:
        yield Damage(error.place, error.cause, remedy)
        return
    for name in manifest.files:
        try:
            manifest.verify(directory, [name])
        except CheckpointError as error:
            yield Damage(error.place, error.cause, remedy)


def _digest(path: Path) -> str:
    """The digest of a file, '' if there is none."""
    return file_digest(path) if path.is_file() else ""
