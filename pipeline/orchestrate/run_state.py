"""``run.json``: what a run has done, always valid and complete; and the lock that keeps a second run out."""

from __future__ import annotations

import contextlib
import fcntl
import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from pipeline.errors import ConfigError, StageError
from pipeline.files import file_digest, write_json
from pipeline.layout import RunDir

State = Literal["pending", "running", "done", "failed"]


class Artifact(BaseModel):
    """A file as it was when its stage ended."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    digest: str = Field(description="xxh3-128 of the content.")
    size: int = Field(description="Bytes.")
    modified: int = Field(
        description="Time of the last change (nanoseconds since 1970); a file untouched is not read again."
    )

    @classmethod
    def of(cls, path: Path, digest: str | None = None) -> Artifact:
        """``digest``, where the writer knows it already, spares reading the file."""
        status = path.stat()
        return cls(
            digest=digest or file_digest(path), size=status.st_size, modified=status.st_mtime_ns
        )

    def matches(self, path: Path) -> bool:
        """Whether the file is there with the same content."""
        try:
            status = path.stat()
        except FileNotFoundError:
            return False
        if status.st_size != self.size:
            return False
        return status.st_mtime_ns == self.modified or file_digest(path) == self.digest


class StageRecord(BaseModel):
    """What the ledger knows of one stage."""

    model_config = ConfigDict(extra="ignore")

    state: State = "pending"
    seconds: float = Field(0.0, description="Time worked, over all attempts that ended in order.")
    inputs: dict[str, str] = Field(default_factory=dict, description="Digests by name.")
    outputs: dict[str, Artifact] = Field(
        default_factory=dict, description="By path, relative to the run's directory."
    )
    metrics: dict[str, float] = Field(
        default_factory=dict, description="Numbers by name, such as top1."
    )
    error: str = ""


class RunStateRecord(BaseModel):
    """The content of ``run.json``."""

    model_config = ConfigDict(extra="ignore")

    format: Literal[1] = 1
    name: str
    stages: dict[str, StageRecord] = Field(default_factory=dict)


class RunState:
    """Reads ``run.json`` and rewrites it whole, atomically, at every change."""

    def __init__(self, run_dir: RunDir, name: str) -> None:
        self._path = run_dir.run_json
        self._record = read_run_state(run_dir) or RunStateRecord(name=name)

    def declare(self, stages: list[str]) -> None:
        """The stages of the job, in order; a stage never seen is pending."""
        known = self._record.stages
        ordered = {name: known.get(name, StageRecord()) for name in stages}
        self._record.stages = ordered | {
            name: record for name, record in known.items() if name not in ordered
        }
        self._save()

    def stage(self, name: str) -> StageRecord:
        """The record of a stage; pending if it never began."""
        return self._record.stages.get(name, StageRecord())

    def begin(self, name: str, inputs: dict[str, str], *, anew: bool) -> None:
        """The stage runs from now on; ``anew``: earlier attempts no longer count."""
        seconds = 0.0 if anew else self.stage(name).seconds
        self._record.stages[name] = StageRecord(state="running", seconds=seconds, inputs=inputs)
        self._save()

    def finish(
        self, name: str, seconds: float, outputs: dict[str, Artifact], metrics: dict[str, float]
    ) -> None:
        record = self._record.stages[name]
        finite = {
            key: value for key, value in metrics.items() if math.isfinite(value)
        }  # JSON knows no others
        record.state, record.outputs, record.metrics, record.error = "done", outputs, finite, ""
        record.seconds = round(record.seconds + seconds, 3)
        self._save()

    def stop(self, name: str, seconds: float, error: str = "") -> None:
        """The stage ended early: with an error, or (none) on request, so that it is still to be done."""
        record = self._record.stages[name]
        record.state, record.error = ("failed", error) if error else ("pending", "")
        record.seconds = round(record.seconds + seconds, 3)
        self._save()

    def _save(self) -> None:
        write_json(self._path, self._record.model_dump(mode="json"))


def read_run_state(run_dir: RunDir) -> RunStateRecord | None:
    """The ledger of a run, or None where there is none yet.

    Raises:
        StageError: ``run.json`` is not a ledger.
    """
    path = run_dir.run_json
    try:
        return RunStateRecord.model_validate(json.loads(path.read_text()))
    except FileNotFoundError:
        return None
    except (ValueError, ValidationError) as error:
        remedy = "restore the file, or move the run's directory away to begin a new run"
        raise StageError(
            f"is not the ledger of a run ({error})", place=str(path), remedy=remedy
        ) from None


@contextlib.contextmanager
def run_lock(run_dir: RunDir) -> Iterator[None]:
    """Only one process at a time works on a run; the lock dies with its holder, however it ends.

    Raises:
        ConfigError: another process holds it.
    """
    run_dir.path.mkdir(parents=True, exist_ok=True)
    with open(run_dir.lock, "a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read().strip() or "unknown"
            remedy = f"wait for process {holder} or end it, or give this run a directory of its own with --run-dir"
            cause = f"process {holder} works on this run"
            raise ConfigError(cause, place=str(run_dir.path), remedy=remedy) from None
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield
