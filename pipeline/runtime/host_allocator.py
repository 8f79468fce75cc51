"""Host memory of a process that computes on the CPU."""

from __future__ import annotations

import ctypes

_TRIM_THRESHOLD, _MMAP_MAX = -1, -4  # of mallopt(3)


def keep_freed_memory() -> None:
    """Freed memory stays with this process, as CUDA's caching allocator has it; where the C library is not glibc, no change.

    By default glibc gives blocks of many MiB back to the kernel, which clears every page of the next one: a step of
    training, which asks for the same blocks again and again, spends 5-30% of its time so.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_MMAP_MAX, 0)
        mallopt(_TRIM_THRESHOLD, -1)
