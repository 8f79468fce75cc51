"""Environment variables of DeepSpeed and Ray. They must be set before either is imported; this is the one place that names them."""

from __future__ import annotations

from pathlib import Path


def training_process(device: str, threads: int) -> dict[str, str]:
    """For a process that trains or evaluates on ``device`` (cpu or cuda) with so many compute threads."""
    environment = {
        "OMP_NUM_THREADS": str(threads),
        "DS_BUILD_OPS": "0",
        "PYTHONUNBUFFERED": "1",
        "TORCH_CPP_LOG_LEVEL": "ERROR",
    }
    if device == "cpu":
        environment |= {"DS_ACCELERATOR": "cpu", "GLOO_SOCKET_IFNAME": "lo"}
    return environment


def rank_of_group(
    rank: int, world_size: int, local_rank: int, local_world_size: int
) -> dict[str, str]:
    """Coordinates of one process, as torchrun sets them; LOCAL_SIZE is DeepSpeed's name for LOCAL_WORLD_SIZE."""
    return {
        "RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_RANK": str(local_rank),
        "LOCAL_WORLD_SIZE": str(local_world_size),
        "LOCAL_SIZE": str(local_world_size),
    }


def ray_session(token: Path) -> dict[str, str]:
    """For the driver, before ``import ray``; everything that Ray starts inherits it. ``token``: file of the access token."""
    return {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        "RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES": "1",  # LOCAL_RANK chooses the device, as everywhere
        "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "3",
        "RAY_worker_niceness": "0",  # Ray's default of 15 lets any other process starve the training
    }
