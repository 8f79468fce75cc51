"""Groups of real processes for tests.

They are forked from a server that has imported everything once, so that a group starts in a
fraction of a second.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import socket
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

_FORK_SERVER = multiprocessing.get_context("forkserver")
_FORK_SERVER.set_forkserver_preload(
    [
        "deepspeed",
        "deepspeed.runtime.zero.stage3",
        "torch._dynamo",
        "torch.utils.tensorboard",
        "pipeline.train.trainer",
        "pipeline.evaluate.classify",
    ]
)

Function = Callable[..., Any]  # importable by name; called in each process


@dataclass
class Group:
    """A running group of processes."""

    processes: list[BaseProcess]
    folder: Path

    def results(self, timeout: float = 240) -> list[Any]:
        """Wait for each rank: what it returned, or the exception that it raised.

        Fails if a process dies or takes longer than ``timeout`` seconds.
        """
        for process in self.processes:
            process.join(timeout)
        for rank, process in enumerate(self.processes):
            if process.exitcode != 0:
                self.kill()
                log = (self.folder / f"log-{rank}").read_text(errors="replace")
                raise AssertionError(f"rank {rank} ended with {process.exitcode}:\n{log[-4000:]}")
        return [
            pickle.loads((self.folder / f"result-{rank}").read_bytes())
            for rank in range(len(self.processes))
        ]

    def kill(self) -> None:
        """Send SIGKILL to all processes."""
        for process in self.processes:
            if process.is_alive() and process.pid is not None:
                os.kill(process.pid, signal.SIGKILL)
        for process in self.processes:
            process.join()


def start(folder: Path, world_size: int, function: Function, *arguments: Any) -> Group:
    """Call ``function(*arguments)`` on every rank of a new group.

    Logs and results are written to ``folder``.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    processes: list[BaseProcess] = []
    for rank in range(world_size):
        environment = {
            "RANK": rank,
            "LOCAL_RANK": rank,
            "WORLD_SIZE": world_size,
            "LOCAL_SIZE": world_size,
            "GLOO_SOCKET_IFNAME": "lo",
        }
        environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port} if world_size > 1 else {}
        process = _FORK_SERVER.Process(
            target=_call, args=(folder, rank, environment, function, arguments)
        )
        process.start()
        processes.append(process)
    return Group(processes, folder)


def run(folder: Path, world_size: int, function: Function, *arguments: Any) -> list[Any]:
    """``start`` a group and return its ``results``."""
    return start(folder, world_size, function, *arguments).results()


def _call(
    folder: Path,
    rank: int,
    environment: dict[str, Any],
    function: Function,
    arguments: tuple[Any, ...],
) -> None:
    with open(folder / f"log-{rank}", "wb") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    os.environ.update({key: str(value) for key, value in environment.items()})
    try:
        result = function(*arguments)
    except Exception as error:
        traceback.print_exc()
        result = error
    (folder / f"result-{rank}").write_bytes(pickle.dumps(result))
    os._exit(0)  # at once: an ordinary exit may wait for threads
