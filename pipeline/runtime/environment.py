"""Environment variables of DeepSpeed and Ray: the one place that names them.

Both libraries read them when they are imported, so they must be set before.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

# Of torchrun and of MPI: a process of ours that finds them takes itself for one of theirs.
# DeepSpeed asks MPI for the ranks, and torch waits for the store of an agent.
_OTHER_LAUNCHERS = ("TORCHELASTIC_", "PET_", "OMPI_", "PMI_", "PMIX_", "MV2_", "MPI_", "I_MPI_")
_KUBERNETES_JOB = "PIPELINE_JOB"  # name of the RayJob, in its pods
_KUBERNETES_RESTARTS = "PIPELINE_RESTARTS"


def forget_other_launchers() -> None:
    """Remove the variables that another launcher around ``run`` has set from this process."""
    for name in [name for name in os.environ if name.startswith(_OTHER_LAUNCHERS)]:
        del os.environ[name]


def restarts() -> int:
    """How often the scheduler has started this job again: after a preemption, a loss, a limit."""
    count = os.environ.get("SLURM_RESTART_COUNT") or os.environ.get(_KUBERNETES_RESTARTS)
    return int(count or 0)


def deepspeed_import(device: str) -> dict[str, str]:
    """Variables that ``import deepspeed`` reads, for a process on ``device`` (cpu or cuda)."""
    # DS_BUILD_OPS=0: build no compiled extensions; this pipeline uses none of them.
    environment = {"DS_BUILD_OPS": "0"}
    if device == "cpu":
        environment["DS_ACCELERATOR"] = "cpu"
    return environment


def training_process(device: str, threads: int) -> dict[str, str]:
    """Variables of a process that trains or evaluates on ``device`` with ``threads`` threads."""
    return deepspeed_import(device) | {
        "OMP_NUM_THREADS": str(threads),
        "PYTHONUNBUFFERED": "1",
        "TORCH_CPP_LOG_LEVEL": "ERROR",
    }


def collectives(interface: str) -> dict[str, str]:
    """Variables of the libraries that connect the processes of a group; '' leaves them alone.

    Under CUDA, gloo reduces stop requests, and NCCL's processes meet over a socket.
    """
    names = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
    return dict.fromkeys(names, interface) if interface else {}


def rank_of_group(
    rank: int, world_size: int, local_rank: int, local_world_size: int
) -> dict[str, str]:
    """Coordinates of one process, under torchrun's names.

    LOCAL_SIZE is DeepSpeed's name for LOCAL_WORLD_SIZE.
    """
    return {
        "RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_RANK": str(local_rank),
        "LOCAL_WORLD_SIZE": str(local_world_size),
        "LOCAL_SIZE": str(local_world_size),
    }


def ray_session(token: Path) -> dict[str, str]:
    """Variables of the driver, before ``import ray``; every process that Ray starts inherits them.

    Args:
        token: file of the access token.
    """
    return ray_client() | {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token),
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        # LOCAL_RANK chooses the device, as under torchrun: Ray must not hide the other GPUs.
        "RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES": "1",
        "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "3",
        # With Ray's default niceness of 15, any other process on the machine starves the training.
        "RAY_worker_niceness": "0",
    }


def ray_node(grace: float) -> dict[str, str]:
    """Variables of ``ray start`` on a machine of a cluster that we start.

    Args:
        grace: longest time that a stop may take (seconds).
    """
    return ray_client() | {
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": str(int(grace)),
        # A machine that falls silent is lost after 15 s. Ray's own settings need more than 60 s.
        "RAY_health_check_period_ms": "1000",
        "RAY_health_check_timeout_ms": "3000",
        "RAY_health_check_failure_threshold": "4",
        "RAY_worker_niceness": "0",
    }


def ray_job(grace: float) -> dict[str, str]:
    """Variables of a driver that Ray's Jobs API starts: time between its SIGTERM and SIGKILL."""
    return {"RAY_JOB_STOP_WAIT_TIME_S": str(int(grace))}


def kubernetes_job(name: str) -> dict[str, str]:
    """Variables of the pods of a RayJob, for ``job_id``."""
    return {_KUBERNETES_JOB: name}


def kubernetes_driver(count: int) -> dict[str, str]:
    """Variables of the driver of a RayJob, for ``restarts``."""
    return {_KUBERNETES_RESTARTS: str(count)}


def ray_client() -> dict[str, str]:
    """Variables of a process that joins a Ray cluster, before ``import ray``."""
    return {"RAY_USAGE_STATS_ENABLED": "0"}


def job_id() -> str:
    """The scheduler's ID of the job that this process belongs to; "" outside of a job."""
    if job := os.environ.get("SLURM_JOB_ID", "") or os.environ.get(_KUBERNETES_JOB, ""):
        return job
    return ray_submission()


def ray_submission() -> str:
    """The ID of the Ray job whose driver this process belongs to; "" outside of one."""
    try:
        config = json.loads(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR", ""))
        return str(config["metadata"]["job_submission_id"])
    except (ValueError, KeyError, TypeError):
        return ""
