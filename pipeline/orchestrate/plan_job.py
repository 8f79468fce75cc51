"""Plans a job: the work behind the command plan."""

from __future__ import annotations

from collections.abc import Sequence

from pipeline.config import machine
from pipeline.config.devices import DEVICES
from pipeline.config.load import load_job
from pipeline.errors import ConfigError
from pipeline.orchestrate.job_files import find_job_file
from pipeline.plan.report import PlanOptions, plan_text

UNKNOWN_GPU = "h100"  # stands for a GPU that is not in the table


def plan(
    job: str,
    overrides: Sequence[str],
    *,
    gpus: int | None,
    device: str,
    price: float | None,
    images: int | None,
) -> str:
    """The text of a plan. An empty ``device`` is that of the job on this machine.

    Raises:
        ConfigError: the job or the device is unknown, or the job cannot work.
    """
    if device and device not in DEVICES:
        raise ConfigError(
            f"unknown device '{device}'", place="--device", remedy=f"one of {', '.join(DEVICES)}"
        )
    settings = list(overrides)
    # The job of a cluster is planned for devices of the command line as if they were here.
    if device or gpus:
        settings.append("cluster.kind=local")
    if device:
        settings.append(f"cluster.device={'cpu' if device == 'cpu' else 'cuda'}")
    if gpus:
        settings.append(f"cluster.processes={gpus}")
    loaded = load_job(find_job_file(job), settings, plans=True)
    cluster = loaded.job.cluster
    on_cpu = machine.device(cluster) == "cpu"
    world_size = machine.world_size(cluster)
    options = PlanOptions(
        device=device or ("cpu" if on_cpu else UNKNOWN_GPU),
        world_size=world_size,
        threads=machine.threads(cluster, world_size) if on_cpu else 1,
        price=price,
        images=images,
    )
    return plan_text(loaded.job, options)
