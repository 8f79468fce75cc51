"""The process group that a stage's processes form, for as long as the stage runs."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from datetime import timedelta

import torch
import torch.distributed as dist

from pipeline.runtime.dist_env import DistEnv
from pipeline.runtime.host_allocator import keep_freed_memory

TIMEOUT = timedelta(minutes=30)


@contextlib.contextmanager
def process_group(world: DistEnv, use_cuda: bool, threads: int) -> Iterator[torch.device]:
    """Join the group, on this process's device, which is given; leave it in the end.

    Several processes meet at MASTER_ADDR:MASTER_PORT of the environment; one alone needs neither.
    ``threads``: compute threads of this process on the CPU, which then also keeps the memory that it frees.
    """
    device = torch.device("cuda", world.local_rank) if use_cuda else torch.device("cpu")
    if use_cuda:
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(threads)
        keep_freed_memory()
    backend = "cpu:gloo,cuda:nccl" if use_cuda else "gloo"
    alone = world.size == 1 and "MASTER_PORT" not in os.environ
    store = dist.HashStore() if alone else None  # type: ignore[attr-defined]
    dist.init_process_group(
        backend, store=store, rank=world.rank, world_size=world.size, timeout=TIMEOUT
    )
    try:
        yield device
    finally:
        dist.destroy_process_group()
