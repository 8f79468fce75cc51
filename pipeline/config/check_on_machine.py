"""The last step before a job runs: values that depend on the machine, then all checks."""

from __future__ import annotations

from dataclasses import replace

from pipeline.config import machine
from pipeline.config.check import check
from pipeline.config.export_formats import FORMATS
from pipeline.config.load import LoadedJob
from pipeline.config.machine import Hardware
from pipeline.config.micro_batch import choose_micro_batches
from pipeline.config.schema import Job
from pipeline.layout import RunDir


def check_on_machine(
    loaded: LoadedJob,
    run_dir: RunDir,
    *,
    world_size: int | None = None,
    hardware: Hardware | None = None,
) -> LoadedJob:
    """Return the job as this machine runs it.

    Args:
        run_dir: stages may use the results of an earlier run in this directory.
        world_size: number of training processes; default: as the job says.
        hardware: of the machine; default: this one.

    Raises:
        ConfigError: the job cannot work; names every problem.
    """
    cluster = loaded.job.cluster
    world_size = machine.world_size(cluster) if world_size is None else world_size
    hardware = machine.hardware(cluster) if hardware is None else hardware
    loaded = choose_micro_batches(loaded, world_size, hardware.device_bytes)
    check(loaded.job, world_size, loaded.origins, run_dir, hardware)
    return replace(loaded, notes=[*loaded.notes, *_missing_formats(loaded.job)])


def _missing_formats(job: Job) -> list[str]:
    """Formats that this machine cannot write, for want of a package: all others are written."""
    stage = job.stages.export
    formats = {} if stage is None else {name: FORMATS[name] for name in stage.formats}
    return [
        f"stages.export.formats: {name} will not be written: {', '.join(facts.missing)} is not "
        f"installed: {facts.install}"
        for name, facts in formats.items()
        if facts.missing
    ]
