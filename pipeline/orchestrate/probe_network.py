"""The network part of the checks before the first stage; Ray calls it on each machine."""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta

import psutil

from pipeline.runtime import environment

_LINK_TIMEOUT = timedelta(seconds=6)
_LINK_BYTES = 8 << 20
_LINK_REPEATS = 3
_REACH_S = 6.0
_CONNECT_S = 1.0
_POLL_S = 0.1
_LONGEST_ID = 128


@dataclass(frozen=True, kw_only=True)
class LinkTest:
    """An all-reduce.

    Attributes:
        machines: their IDs; the first one has rank 0.
        meeting_point: address:port of rank 0.
        interface: network interface of the job; empty: as the library chooses.
        device: cpu (gloo) or cuda (NCCL).
    """

    machines: Sequence[str]
    meeting_point: str
    interface: str
    device: str


def own_id() -> str:
    """Ray's ID of the machine that this process runs on."""
    import ray

    return str(ray.get_runtime_context().get_node_id())


def measure_link(test: LinkTest) -> float:
    """One small all-reduce between all machines.

    Returns:
        bytes per second through the network, per machine.
    """
    import torch
    import torch.distributed as dist

    host, _, port = test.meeting_point.rpartition(":")
    rank = test.machines.index(own_id())
    size = len(test.machines)
    use_cuda = test.device == "cuda"
    os.environ.update(environment.collectives(test.interface))
    if use_cuda:
        torch.cuda.set_device(0)
    store = dist.TCPStore(  # type: ignore[attr-defined]
        host, int(port), size, is_master=rank == 0, timeout=_LINK_TIMEOUT
    )
    dist.init_process_group(
        "nccl" if use_cuda else "gloo",
        store=store,
        rank=rank,
        world_size=size,
        timeout=_LINK_TIMEOUT,
    )
    try:
        tensor = torch.zeros(_LINK_BYTES // 4, device=test.device)

        def reduce() -> None:
            dist.all_reduce(tensor)
            if use_cuda:
                torch.cuda.synchronize()

        seconds = _shortest(reduce)
    finally:
        # Ray keeps this process for the next call, which may form another group.
        dist.destroy_process_group()
    # Each machine sends and receives 2 (n - 1) / n of the tensor.
    return 2 * (size - 1) / size * _LINK_BYTES / seconds


def unreachable(points: Mapping[str, str]) -> list[str]:
    """IDs of the machines with which no connection is possible, in one direction or the other.

    Args:
        points: address:port at which each machine listens now, by ID; this one among them.
    """
    own = own_id()
    unreached = {name: point for name, point in points.items() if name != own}
    unheard = set(unreached)
    host, _, port = points[own].rpartition(":")
    with socket.create_server((host, int(port)), backlog=len(points)) as server:
        server.settimeout(_POLL_S)
        deadline = time.monotonic() + _REACH_S  # the others may start later
        while (unreached or unheard) and time.monotonic() < deadline:
            unreached = {name: point for name, point in unreached.items() if not _greet(point, own)}
            unheard -= set(_greetings(server))
    return sorted(unheard | set(unreached))


def _greet(point: str, own: str) -> bool:
    """Connect to another machine and send the ID of this one; False if that is not possible."""
    host, _, port = point.rpartition(":")
    try:
        with socket.create_connection((host, int(port)), timeout=_CONNECT_S) as connection:
            connection.sendall(own.encode())
            return True
    except OSError:
        return False


def _greetings(server: socket.socket) -> Iterator[str]:
    """IDs of the machines that have connected since the last call."""
    with contextlib.suppress(TimeoutError):
        while True:
            connection, _ = server.accept()
            with connection, contextlib.suppress(OSError):
                connection.settimeout(_CONNECT_S)
                yield connection.makefile("rb").read(_LONGEST_ID).decode(errors="replace")


def _shortest(action: Callable[[], None]) -> float:
    times = []
    for _ in range(1 + _LINK_REPEATS):  # the first one connects
        start = time.perf_counter()
        action()
        times.append(time.perf_counter() - start)
    return max(min(times[1:]), 1e-6)


def interface_addresses(interface: str) -> list[str]:
    """IPv4 addresses of an interface; of all, if none is named."""
    return [
        entry.address
        for name, entries in psutil.net_if_addrs().items()
        for entry in entries
        if entry.family == socket.AF_INET and interface in ("", name)
    ]
