"""How benchmarks run things: pieces of work one after the other or in a pool, a case in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, as_completed
from typing import Any, TypeVar

import psutil

MIB = 2.0**20
SAMPLING = 0.2  # seconds between two looks at a process's memory

Item = TypeVar("Item")
Result = TypeVar("Result")


def serially(
    function: Callable[[Item], Result], items: Sequence[Item]
) -> Iterator[tuple[Item, Result]]:
    """Tasks (`pipeline.prepare.build.MapTasks`) in this process."""
    for item in items:
        yield item, function(item)


class Pooled:
    """Tasks in the processes of a pool."""

    def __init__(self, pool: Executor) -> None:
        self.pool = pool

    def __call__(
        self, function: Callable[[Item], Result], items: Sequence[Item]
    ) -> Iterator[tuple[Item, Result]]:
        futures = {self.pool.submit(function, item): item for item in items}
        for future in as_completed(futures):
            yield futures[future], future.result()


def run_case(module: str, case: Mapping[str, Any]) -> dict[str, Any]:
    """Run ``python -m module CASE`` (as JSON). Its last line of output, as JSON, is the result, with ``peak_mb``.

    ``peak_mb``, unless the case reports its own: the largest sum of the resident memory (MiB) of the process and its children,
    sampled every SAMPLING seconds. Pages that processes share, and pages of mapped files, count in each process.
    """
    command = [sys.executable, "-m", module, json.dumps(case)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        peak = 0
        while process.poll() is None:
            peak = max(peak, _resident(process.pid))
            time.sleep(SAMPLING)
        output = process.stdout.read() if process.stdout is not None else ""
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)
    return {"peak_mb": peak / MIB, **json.loads(output.splitlines()[-1])}


def _resident(pid: int) -> int:
    """Bytes of a process and its children; what has just ended counts as nothing."""
    total = 0
    try:
        root = psutil.Process(pid)
        family = [root, *root.children(recursive=True)]
    except psutil.NoSuchProcess:
        return 0
    for process in family:
        try:
            total += process.memory_info().rss
        except psutil.NoSuchProcess:
            continue
    return total
