"""``cluster.json``: where a run was submitted to. The commands about runs need nothing else."""

from __future__ import annotations

import json
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from pipeline.config.schema import ClusterConfig, Section
from pipeline.config.schema.cluster import RayConfig, SlurmConfig
from pipeline.config.schema.kubernetes import KubernetesConfig
from pipeline.errors import StageError
from pipeline.files import write_json
from pipeline.layout import RunDir

# The machines of a cluster must agree on them.
_LIBRARIES = ("torch", "ray", "deepspeed", "numpy", "pyarrow", "pydantic")
# What a launcher needs of the cluster section besides plain values.
_SECTIONS: dict[str, type[Section]] = {
    "ray": RayConfig,
    "slurm": SlurmConfig,
    "kubernetes": KubernetesConfig,
}


class ClusterRecord(BaseModel):
    """The content of ``cluster.json``. Holds no secret: of a token, only the path of its file."""

    # A later version may add fields: ignore them, so that an older one can still follow the run.
    model_config = ConfigDict(extra="ignore")

    kind: str = Field(description="Kind of the cluster: ray, slurm or kubernetes.")
    id: str = Field(description="ID of the job.")
    address: str = Field("", description="Kind ray: address of the dashboard.")
    directory: str = Field(description="The run directory, as the cluster sees it.")
    attempt: int = Field(1, description="Number of the submission of this run, from 1.")
    cluster: dict[str, Any] = Field(
        default_factory=dict, description="The job's cluster section, as plain values."
    )
    log_start: int = Field(0, description="Bytes of the log before this submission.")
    submitted: float = Field(0.0, description="Time of the submission (seconds since 1970).")
    versions: dict[str, str] = Field(
        default_factory=dict, description="Of Python and the libraries that submitted it."
    )
    code: str = Field("", description="Digest of the pipeline's source files.")

    @property
    def config(self) -> ClusterConfig:
        """The job's cluster section. Keys of another version are ignored."""
        # The schema of jobs refuses unknown keys, because they are a user's mistakes. Here they are
        # those of a later version, which is no reason to lose sight of a run.
        known: dict[str, Any] = {
            key: value
            for key, value in self.cluster.items()
            if key in ClusterConfig.model_fields and not isinstance(value, dict)
        }
        for name, section in _SECTIONS.items():
            values = self.cluster.get(name) or {}
            known[name] = {
                key: value for key, value in values.items() if key in section.model_fields
            }
        try:
            return ClusterConfig.model_validate({**known, "kind": self.kind})
        except ValidationError as error:
            raise StageError(
                f"this version cannot talk to the cluster of the run: {error}",
                place=f"{self.directory}: {self.kind}",
                remedy="use the version that submitted the run",
            ) from None

    @property
    def run_dir(self) -> RunDir:
        """The run directory; not every machine sees it."""
        return RunDir(Path(self.directory))


def versions() -> dict[str, str]:
    """Versions of Python and of the libraries that must agree between machines."""
    libraries = {name: metadata.version(name) for name in _LIBRARIES}
    return {"python": platform.python_version(), **libraries}


def read_record(run_dir: RunDir) -> ClusterRecord | None:
    """Where a run was submitted to; None for a run of this machine.

    Raises:
        StageError: the file is damaged.
    """
    # Missing is an answer; damaged is not: a second job on a run that is under way must not follow.
    path = run_dir.cluster_json
    try:
        return ClusterRecord.model_validate(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return None
    except (ValueError, ValidationError) as error:
        raise StageError(
            f"does not say where the run was submitted to ({error})",
            place=str(path),
            remedy="look for the job with the scheduler's own commands; remove the file only when "
            "no job works on the run",
        ) from None


def write_record(run_dir: RunDir, record: ClusterRecord) -> None:
    """Write ``cluster.json`` atomically."""
    write_json(run_dir.cluster_json, record.model_dump(mode="json"))
