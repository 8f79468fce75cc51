"""``run.json``, the state of each stage of a run."""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from pipeline.errors import StageError
from pipeline.files import file_digest, matches_digest, with_digest, write_json
from pipeline.layout import RunDir
from pipeline.monitor.goodput import Goodput

# pending: not started, or stopped on request. A stage whose driver was killed stays "running"; the
# lock of the run (run_lock), not this state, tells whether a process is working on it.
State = Literal["pending", "running", "done", "failed"]


class Artifact(BaseModel):
    """A file as it was when its stage ended."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    digest: str = Field(description="xxh3-128 of the content.")
    size: int = Field(description="Bytes.")
    modified: int = Field(description="Time of the last change (nanoseconds since 1970).")

    @classmethod
    def of(cls, path: Path, digest: str | None = None) -> Artifact:
        """Describe a file. A ``digest`` that is known already saves reading the file."""
        status = path.stat()
        return cls(
            digest=digest or file_digest(path), size=status.st_size, modified=status.st_mtime_ns
        )

    def matches(self, path: Path, *, trust_time: bool = False) -> bool:
        """True if the file exists with the same content.

        Args:
            trust_time: do not read a file whose size and time of change are the same. A disk that
                flips a bit changes neither, so this is for files too large to read every time.
        """
        try:
            status = path.stat()
        except FileNotFoundError:
            return False
        if status.st_size != self.size:
            return False
        if trust_time and status.st_mtime_ns == self.modified:
            return True
        return file_digest(path) == self.digest


class StageRecord(BaseModel):
    """The state of one stage."""

    # A later version may add fields: ignore them, so that an older one can still resume the run.
    model_config = ConfigDict(extra="ignore")

    state: State = "pending"
    seconds: float = Field(0.0, description="Run time of all attempts that were not killed.")
    inputs: dict[str, str] = Field(default_factory=dict, description="Digests by name.")
    settings: str = Field("", description="Digest of the job that the stage was started with.")
    outputs: dict[str, Artifact] = Field(
        default_factory=dict, description="By path, relative to the run directory."
    )
    metrics: dict[str, float] = Field(
        default_factory=dict, description="Results by name, such as top1."
    )
    outdated: list[str] = Field(
        default_factory=list,
        description="Inputs that have changed since the stage ended: its metrics are those of "
        "other data or weights than the ones that are here now.",
    )
    error: str = ""
    failures: int = Field(
        0, description="Groups of processes that failed since the last progress, over all calls."
    )

    @property
    def in_words(self) -> str:
        """The state for a person: a pending stage was either never started, or interrupted."""
        if self.state != "pending":
            return self.state
        return "interrupted" if self.seconds > 0 else "not started"

    @model_validator(mode="before")
    @classmethod
    def _read_older_names(cls, values: object) -> object:
        # Version 0.1.0 wrote the metrics as "figures".
        if isinstance(values, dict) and "figures" in values:
            return {"metrics": values["figures"], **values}
        return values


class RunStateRecord(BaseModel):
    """The content of ``run.json``."""

    model_config = ConfigDict(extra="ignore")

    format: Literal[1] = 1
    name: str
    stages: dict[str, StageRecord] = Field(default_factory=dict)
    seconds: dict[str, float] = Field(
        default_factory=dict, description="Where the time of the run went, summed over all calls."
    )
    restarts: int = Field(0, description="How often processes of a stage were started again.")


class RunState:
    """Reads ``run.json``, and rewrites it atomically at every change."""

    def __init__(self, run_dir: RunDir, name: str) -> None:
        self._run_dir = run_dir
        self._record = read_run_state(run_dir) or RunStateRecord(name=name)

    def declare(self, stages: Sequence[str]) -> None:
        """Set the stages of the job, in order. A new stage is pending.

        Records of stages that the job no longer has are kept, at the end.
        """
        known = self._record.stages
        ordered = {name: known.get(name, StageRecord()) for name in stages}
        dropped = {name: record for name, record in known.items() if name not in ordered}
        self._record.stages = ordered | dropped
        self._save()

    def stage(self, name: str) -> StageRecord:
        """The record of a stage; pending if it was never started."""
        return self._record.stages.get(name, StageRecord())

    def reset(self, name: str) -> None:
        """Forget a stage whose results were moved aside."""
        self._record.stages[name] = StageRecord()
        self._save()

    def count_failures(self, name: str, failures: int) -> None:
        """Record how many groups of processes have failed since the last progress of a stage."""
        record = self.stage(name)
        if record.failures != failures:
            self._record.stages[name] = record.model_copy(update={"failures": failures})
            self._save()

    def set_outdated(self, name: str, inputs: list[str]) -> None:
        """Record which inputs of a finished stage have changed since; [] if none."""
        record = self._record.stages[name]
        if record.outdated != inputs:
            record.outdated = inputs
            self._save()

    def start(self, name: str, inputs: dict[str, str], *, from_scratch: bool) -> None:
        """Set a stage to running. From scratch, the time of earlier attempts does not count."""
        before = StageRecord() if from_scratch else self.stage(name)
        settings = self._run_dir.started_with(name)
        self._record.stages[name] = StageRecord(
            state="running",
            seconds=before.seconds,
            inputs=inputs,
            settings=file_digest(settings) if settings.is_file() else "",
            failures=before.failures,
        )
        self._save()

    def finish(
        self, name: str, seconds: float, outputs: dict[str, Artifact], metrics: dict[str, float]
    ) -> None:
        """Set a stage to done."""
        record = self._record.stages[name]
        record.state = "done"
        record.outputs = outputs
        # JSON has no NaN and no infinity.
        record.metrics = {key: value for key, value in metrics.items() if math.isfinite(value)}
        record.error = ""
        record.failures = 0
        record.seconds = round(record.seconds + seconds, 3)
        self._save()

    def stop(self, name: str, seconds: float, error: str = "") -> None:
        """Set a stage that ended early to failed, or to pending if there was no error."""
        record = self._record.stages[name]
        record.state = "failed" if error else "pending"
        record.error = error
        record.seconds = round(record.seconds + seconds, 3)
        self._save()

    @property
    def goodput(self) -> Goodput:
        """Where the time of the run went, as of the last ``account``."""
        return Goodput.recorded(self._record.seconds, self._record.restarts)

    def account(self, goodput: Goodput) -> None:
        """Record where the time of the run went."""
        self._record.seconds = {part: round(value, 3) for part, value in goodput.seconds.items()}
        self._record.restarts = goodput.restarts
        self._save()

    def _save(self) -> None:
        # The whole file, under another name and then renamed: a crash leaves the old one complete.
        write_json(self._run_dir.run_json, with_digest(self._record.model_dump(mode="json")))


def read_run_state(run_dir: RunDir) -> RunStateRecord | None:
    """The state of a run, or None if the run has none yet.

    Raises:
        StageError: ``run.json`` is damaged, or of another format.
    """
    path = run_dir.run_json
    try:
        values = json.loads(path.read_text())
        # Version 0.1.0 wrote no digest.
        if isinstance(values, dict) and not matches_digest(values):
            raise ValueError("checksum mismatch: it changed after it was written")
        return RunStateRecord.model_validate(values)
    except FileNotFoundError:
        return None
    except (ValueError, ValidationError) as error:
        raise StageError(
            f"is not the state of a run ({error})",
            place=str(path),
            remedy="restore the file, or move it away with "
            f"`mv {shlex.quote(str(path))} {shlex.quote(f'{path}.damaged')}` and rerun the same "
            "command: each stage finds its results again",
        ) from None
