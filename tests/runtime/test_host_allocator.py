"""Memory that the training process frees."""

from __future__ import annotations

import subprocess
import sys

import pytest

STEPS = """
import resource, sys
import torch
from pipeline.runtime.host_allocator import keep_freed_memory
if "keep" in sys.argv:
    keep_freed_memory()
def step():
    torch.zeros(12 << 20).add(1)  # 48 MiB twice, more than glibc ever keeps by itself
for _ in range(8):  # the heap grows to what it needs
    step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(8):
    step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="of glibc")
def test_freed_memory_is_not_cleared_again_by_the_kernel() -> None:
    def faults(*arguments: str) -> int:
        done = subprocess.run(
            [sys.executable, "-c", STEPS, *arguments], capture_output=True, text=True, check=True
        )
        return int(done.stdout)

    assert faults("keep") < 0.1 * faults()
