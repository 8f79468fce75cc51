"""How benchmarks run: preparation tasks here or in a pool, and each case in a new process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, as_completed
from typing import Any, TypeVar

import psutil

MIB = 2.0**20
SAMPLING_INTERVAL = 0.2  # seconds between two measurements of a process's memory

Item = TypeVar("Item")
Result = TypeVar("Result")


def serially(
    function: Callable[[Item], Result], items: Sequence[Item]
) -> Iterator[tuple[Item, Result]]:
    """Run tasks one after the other in this process (a `pipeline.prepare.build.MapTasks`)."""
    for item in items:
        yield item, function(item)


class PoolTasks:
    """Run tasks in the processes of a pool (a `pipeline.prepare.build.MapTasks`)."""

    def __init__(self, pool: Executor) -> None:
        self.pool = pool

    def __call__(
        self, function: Callable[[Item], Result], items: Sequence[Item]
    ) -> Iterator[tuple[Item, Result]]:
        futures = {self.pool.submit(function, item): item for item in items}
        for future in as_completed(futures):
            yield futures[future], future.result()


def silent(*_: object, **__: object) -> None:
    """A log and a progress report that print nothing: output would be measured too."""


def run_case(module: str, case: Mapping[str, Any]) -> dict[str, Any]:
    """Run one case of a benchmark in a new process, so that cases do not influence each other.

    The process is ``python -m <module> <case as JSON>``. The last line of its output is its result,
    as JSON. Unless the result has a ``peak_mb`` of its own, this function adds it: the largest
    resident memory of the process and its children together (MiB), measured every
    SAMPLING_INTERVAL. Pages that are shared, or belong to mapped files, count once per process.

    Raises:
        subprocess.CalledProcessError: if the process fails; its traceback is on stderr.
    """
    # The result is a few hundred bytes: it fits into the pipe, so that reading it after the end of
    # the process cannot block. Progress and tracebacks go to stderr, which is not captured.
    command = [sys.executable, "-m", module, json.dumps(case)]
    # Read at the import of `datasets`: a benchmark of local files must not wait for the hub.
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        peak = 0
        while process.poll() is None:
            peak = max(peak, _resident(process.pid))
            time.sleep(SAMPLING_INTERVAL)
        output = process.stdout.read() if process.stdout is not None else ""
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)
    return {"peak_mb": peak / MIB, **json.loads(output.splitlines()[-1])}


def run_and_report(module: str, case: Mapping[str, Any], title: str) -> dict[str, Any]:
    """``run_case`` for a case that measures images per second, which are shown on stderr."""
    result = run_case(module, case)
    print(f"{title}: {result['images_per_s']:.1f} images/s", file=sys.stderr, flush=True)
    return result


def _resident(pid: int) -> int:
    """Resident memory of a process and its children, in bytes."""
    total = 0
    try:
        root = psutil.Process(pid)
        processes = [root, *root.children(recursive=True)]
    except psutil.NoSuchProcess:
        return 0
    for process in processes:
        # A child may end between the listing and the measurement.
        try:
            total += process.memory_info().rss
        except psutil.NoSuchProcess:
            continue
    return total
