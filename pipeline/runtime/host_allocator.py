"""Settings of the C library's memory allocator, for a process that computes on the CPU."""

from __future__ import annotations

import ctypes

# Parameters of mallopt(3).
_TRIM_THRESHOLD = -1
_MMAP_MAX = -4


def keep_freed_memory() -> None:
    """Keep freed memory in this process, as CUDA's caching allocator does.

    By default, glibc returns blocks of many MiB to the kernel, and the kernel clears every page of
    the next block. A training step requests the same blocks again and again, so it would spend a
    large part of its time on clearing pages. Without glibc, this function does nothing.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_MMAP_MAX, 0)  # allocate large blocks from the heap too, never by mmap
        mallopt(_TRIM_THRESHOLD, -1)  # never shrink the heap
