"""How many columns may keep their graphs: as many as fit the memory that a step leaves free."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

SHARE = 0.8  # of the free memory that stored columns may take


class ActivationBudget:
    """Decides once for an input shape: the first step stores one column and measures it, the next ones store what fits."""

    def __init__(self) -> None:
        self.shape: torch.Size | None = None
        self.kept: dict[
            int, int
        ] = {}  # bytes of each storage that the measured column's graph keeps
        self.chosen: int | None = None

    def of(self, images: Tensor, columns: int) -> int:
        """Columns that keep their graphs in this step, the same on every rank (their recompute gathers parameters)."""
        if images.shape != self.shape:
            self.shape, self.kept, self.chosen = images.shape, {}, None
        if self.chosen is None and self.kept:
            column = sum(self.kept.values())
            working = (
                0 if images.device.type == "cuda" else 2 * column
            )  # of the recompute; on CUDA the peak contains it
            fits = 1 + max(0, int((SHARE * free_memory(images.device) - working) / column))
            self.chosen, self.kept = _smallest_over_ranks(min(columns, fits), images.device), {}
        return 1 if self.chosen is None else self.chosen

    @contextmanager
    def measured(self) -> Iterator[None]:
        """Until decided: count what autograd keeps of the stored column that runs inside (parameters aside)."""
        if self.chosen is not None:
            yield
            return

        def pack(kept: Tensor) -> Tensor:
            if not isinstance(kept, torch.nn.Parameter) and not isinstance(
                kept._base, torch.nn.Parameter
            ):
                storage = kept.untyped_storage()
                self.kept[storage.data_ptr()] = storage.nbytes()
            return kept

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda kept: kept):
            yield


def free_memory(device: torch.device) -> float:
    """Bytes: on CUDA what the largest step so far left of the device, on a CPU the memory available now."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return float(
            free + torch.cuda.memory_reserved(device) - torch.cuda.max_memory_allocated(device)
        )
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return 1024.0 * next(
            int(line.split()[1]) for line in lines if line.startswith("MemAvailable")
        )
    except (OSError, StopIteration):
        return float(os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))


def _smallest_over_ranks(value: int, device: torch.device) -> int:
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return value
    smallest = torch.tensor(value, device=device)
    torch.distributed.all_reduce(smallest, op=torch.distributed.ReduceOp.MIN)
    return int(smallest)
