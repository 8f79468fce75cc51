"""The allocator keeps memory that the training process frees."""

from __future__ import annotations

import subprocess
import sys

import pytest

COUNT_PAGE_FAULTS = """
import resource, sys
import torch
from pipeline.runtime.host_allocator import keep_freed_memory
if "keep" in sys.argv:
    keep_freed_memory()
def step():
    torch.zeros(12 << 20).add(1)  # 48 MiB twice, more than glibc ever keeps by itself
for _ in range(8):  # the heap grows to the size that it needs
    step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(8):
    step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def page_faults(*arguments: str) -> int:
    completed = subprocess.run(
        [sys.executable, "-c", COUNT_PAGE_FAULTS, *arguments],
        capture_output=True,
        text=True,
        check=True,
    )
    return int(completed.stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="glibc only")
def test_the_kernel_does_not_clear_kept_memory_again() -> None:
    assert page_faults("keep") < 0.1 * page_faults()
