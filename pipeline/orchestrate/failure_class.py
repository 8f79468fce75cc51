"""What kind of failure ended the processes of a stage, and what follows from it.

| class | known by | what follows |
|---|---|---|
| user, data | an error of the pipeline with a remedy | the stage ends at once |
| program | an exception without progress before | the stage ends at once |
| process | a process that was killed or crashed | a new group |
| hang | no sign of progress | a new group |
| memory | the kernel has ended a process of the machine for lack of memory | a new group |
| device | a message of CUDA, NCCL or the driver | a new group, without that machine |
| storage | an error of the file system | a new group |
| machine | Ray has lost its node | a new group on the others, or a wait for it |

All new groups together are limited: three without progress in between.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class FailureClass:
    """``remedy``: what a user looks at; ``leaves_out``: the machine is not used any more."""

    name: str
    remedy: str
    leaves_out: bool = False


PROGRAM = FailureClass(name="program", remedy="")
PROCESS = FailureClass(name="process", remedy="look for its end in the kernel's log (dmesg)")
HANG = FailureClass(
    name="hang",
    remedy="if it happens again, look at its machine and storage, or raise cluster.hang_timeout",
)
MEMORY = FailureClass(
    name="memory",
    remedy="its machine ran out of memory: lower cluster.loader_threads or cluster.prefetch_mib, "
    "or set offload_optimizer: none",
)
DEVICE = FailureClass(
    name="device",
    remedy="look at the GPU (nvidia-smi -q) and the kernel's log (dmesg) of its machine",
    leaves_out=True,
)
STORAGE = FailureClass(
    name="storage", remedy="look at the file system that the message names, and at its server"
)
MACHINE = FailureClass(name="machine", remedy="look whether its machine is up")

# In the output of a process or in its traceback. The first that matches counts: a device that fails
# also breaks the connections of its process.
_TEXTS = (
    (
        DEVICE,
        r"CUDA error|CUDA driver error|uncorrectable ECC|\bXid\b|device-side assert|"
        r"illegal memory access|unspecified launch failure|ncclUnhandledCudaError|"
        r"ncclSystemError|CUBLAS_STATUS_(EXECUTION_FAILED|INTERNAL_ERROR)|HIP error",
    ),
    (MEMORY, r"\bMemoryError\b|std::bad_alloc|Cannot allocate memory|DefaultCPUAllocator"),
    (
        STORAGE,
        r"Input/output error|Stale file handle|Read-only file system|"
        r"Transport endpoint is not connected|Remote I/O error",
    ),
)
_LOST_NODE = re.compile(r"node (was terminated|died|is dead)|unavailable", re.IGNORECASE)
# In texts of Ray: words that tell nothing, and the causes that it suspects of every lost process.
_PREAMBLE = re.compile(
    r"^The actor (\w+ is unavailable: |is dead because its worker process has died\. "
    r"Worker exit type: \w+ Worker exit detail: )"
)
_GUESSES = re.compile(r"\. The task may .*| Some common causes include: .*")
_KERNEL = Path("/proc/vmstat")


def class_of_death(cause: str, *, out_of_memory: bool) -> FailureClass:
    """The class of a process that ended without an exception.

    Args:
        cause: Ray's line about its end, and the last lines of its output.
        out_of_memory: whether the kernel of its machine has ended a process for lack of memory.
    """
    if out_of_memory:
        return MEMORY
    known = _by_text(cause)
    if known is not None:
        return known
    return MACHINE if _LOST_NODE.search(cause.partition("\n")[0]) else PROCESS


def class_of_exception(traceback: str) -> FailureClass:
    """The class of an exception that is no error of the pipeline's own."""
    return _by_text(traceback) or PROGRAM


def exit_line(error: Exception) -> str:
    """Of Ray's long text, what it knows about an end: "Worker unexpectedly exits with ..."."""
    lines = [line.strip() for line in str(error).strip().splitlines()]
    for word in ("exit", "node was terminated", "unavailable"):
        if line := next((line for line in lines if word in line.lower()), ""):
            return _GUESSES.sub("", _PREAMBLE.sub("", line))
    return type(error).__name__


def kills_for_memory() -> int:
    """How many processes the kernel of this machine has ended for lack of memory since it began."""
    try:
        lines = _KERNEL.read_text().splitlines()
    except OSError:
        return 0
    counts = dict(line.split() for line in lines if " " in line)
    return int(counts.get("oom_kill", 0))


def _by_text(text: str) -> FailureClass | None:
    return next((kind for kind, pattern in _TEXTS if re.search(pattern, text)), None)
