"""Groups of real processes for tests. They are forked from a server that has imported everything once, so that a group
starts in a fraction of a second."""

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

_FORKS = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload(
    [
        "deepspeed",
        "deepspeed.runtime.zero.stage3",
        "deepspeed.runtime.zero.muon.original_muon",
        "torch.utils.tensorboard",
        "pipeline.train.trainer",
        "pipeline.evaluate.classify",
    ]
)

Function = Callable[..., Any]  # importable by name; called in each process


@dataclass
class Group:
    """A group under way: ``results`` waits for what each rank returned."""

    processes: list[BaseProcess]
    folder: Path

    def results(self, timeout: float = 240) -> list[Any]:
        """What each rank returned or raised; fails if one died or takes too long."""
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
        """SIGKILL to all."""
        for process in self.processes:
            if process.is_alive() and process.pid is not None:
                os.kill(process.pid, signal.SIGKILL)
        for process in self.processes:
            process.join()


def start(folder: Path, world: int, function: Function, *arguments: Any) -> Group:
    """``function(*arguments)`` on every rank of a new group; logs and results lie in ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    processes: list[BaseProcess] = []
    for rank in range(world):
        environment = {
            "RANK": rank,
            "LOCAL_RANK": rank,
            "WORLD_SIZE": world,
            "LOCAL_SIZE": world,
            "GLOO_SOCKET_IFNAME": "lo",
        }
        environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port} if world > 1 else {}
        process = _FORKS.Process(target=_run, args=(folder, rank, environment, function, arguments))
        process.start()
        processes.append(process)
    return Group(processes, folder)


def run(folder: Path, world: int, function: Function, *arguments: Any) -> list[Any]:
    """``start`` and wait: what each rank returned or, an exception, raised."""
    return start(folder, world, function, *arguments).results()


def _run(
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
    os._exit(0)  # at once, as a process that is left to itself may wait for threads
