"""The process group of a stage: joined when the stage starts, left when it ends."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from datetime import timedelta

import torch
import torch.distributed as dist

from pipeline.config import machine
from pipeline.config.schema import ClusterConfig
from pipeline.runtime.dist_env import DistEnv
from pipeline.runtime.host_allocator import keep_freed_memory


@contextlib.contextmanager
def process_group(dist_env: DistEnv, cluster: ClusterConfig) -> Iterator[torch.device]:
    """Join the process group and yield this process's device.

    At the end the process leaves the group and has as many threads as before.

    Several processes meet at MASTER_ADDR:MASTER_PORT of the environment. A single
    process needs neither.

    A process on the CPU keeps freed memory.
    """
    # 1. The device.
    use_cuda = machine.device(cluster) == "cuda"
    device = torch.device("cuda", dist_env.device_index) if use_cuda else torch.device("cpu")
    threads_before = torch.get_num_threads()
    if use_cuda:
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(machine.threads(cluster, dist_env.local_size))
        keep_freed_memory()
    # 2. The group. Under CUDA both backends are needed: stop requests are reduced on the CPU.
    backend = "cpu:gloo,cuda:nccl" if use_cuda else "gloo"
    # A single process without a launcher: an in-memory store instead of a TCP port.
    alone = dist_env.size == 1 and "MASTER_PORT" not in os.environ
    store = dist.HashStore() if alone else None  # type: ignore[attr-defined]
    dist.init_process_group(
        backend,
        store=store,
        rank=dist_env.rank,
        world_size=dist_env.size,
        timeout=timedelta(seconds=cluster.collective_timeout),
    )
    try:
        yield device
    finally:
        dist.destroy_process_group()
        torch.set_num_threads(threads_before)
