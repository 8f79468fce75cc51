"""The job's ``cluster`` section: where the processes run."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, PositiveInt

from pipeline.config.schema.rules import Rules
from pipeline.config.schema.section import Section
from pipeline.config.schema.shrink import PROCESSES, fixed


class ClusterConfig(Section):
    """Where the processes run."""

    # Job.cluster allows all of these keys to change when a run resumes.
    kind: Literal["local"] = Field(
        "local", description="'local': a private Ray instance on this machine."
    )
    device: Annotated[Literal["auto", "cpu", "cuda"], Rules(rehearse=fixed("cpu"))] = Field(
        "auto", description="Device to compute on. 'auto': cuda if available, otherwise cpu."
    )
    processes: Annotated[PositiveInt | Literal["auto"], Rules(rehearse=fixed(PROCESSES))] = Field(
        "auto",
        description="Number of training processes (world size). 'auto': one per GPU, or two on "
        "the CPU.",
    )
    threads: PositiveInt | Literal["auto"] = Field(
        "auto", description="Compute threads per process. 'auto': CPU cores / processes."
    )
    loader_threads: PositiveInt | Literal["auto"] = Field(
        "auto",
        description="Image decoding threads per process. 'auto': CPU cores / processes, at most "
        "16.",
    )
    # A limit in bytes, not in batches: a batch of 640-pixel images is 30 times one of 112 pixels.
    prefetch_mib: PositiveInt = Field(
        512,
        description="Memory limit per process for prefetched batches (MiB). At least two batches "
        "are always prefetched.",
    )
