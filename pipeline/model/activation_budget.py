"""Activation budget (``stored_columns: auto``): how many columns can store their activations.

A column with stored activations needs no recompute. So as many columns as fit the free memory are
stored, and only the others are inverted.

Worked example on a CPU, network of 16 columns:

    1st step   stores one column and measures its saved tensors: 100 MB
    2nd step   650 MB are available, of which 80% may be used: 520 MB
               2 * 100 MB are reserved for the recompute of an inverted column: 320 MB remain
               320 / 100 -> 3 further columns: 4 columns are stored from now on

Another shape of the images starts again from the first step.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

# Of the free memory. Other programs share that of a CPU; a GPU loses the allocator's gaps only.
USABLE_SHARE = {"cpu": 0.8, "cuda": 0.92}


class ActivationBudget:
    """Decides the number of stored columns once per shape of the images.

    Attributes:
        shape: shape of the images that the numbers below belong to.
        saved_bytes: size of each storage that the measured column saved, by its address.
        stored_columns: the decision, None until it is made.
    """

    def __init__(self) -> None:
        self.shape: torch.Size | None = None
        self.saved_bytes: dict[int, int] = {}
        self.stored_columns: int | None = None

    def columns_to_store(self, images: Tensor, columns: int) -> int:
        """Return how many of the network's columns store their activations in this step.

        The number is the same on every rank, because under ZeRO-3 a recompute is collective: it
        gathers parameters.
        """
        if images.shape != self.shape:
            self.shape = images.shape
            self.saved_bytes = {}
            self.stored_columns = None
        if self.stored_columns is None and self.saved_bytes:
            per_column = sum(self.saved_bytes.values())
            # An inverted column needs memory during its recompute. On CUDA the measured peak of
            # the first step already contains it.
            recompute = 0 if images.device.type == "cuda" else 2 * per_column
            share = USABLE_SHARE["cuda" if images.device.type == "cuda" else "cpu"]
            usable = share * free_memory(images.device) - recompute
            affordable = 1 + max(0, int(usable / per_column))
            self.stored_columns = _smallest_over_ranks(min(columns, affordable), images.device)
            self.saved_bytes = {}
        return 1 if self.stored_columns is None else self.stored_columns

    @contextmanager
    def measuring(self) -> Iterator[None]:
        """Measure what autograd saves for the column that runs inside, until the decision is made.

        Parameters are not counted: they exist anyway.
        """
        if self.stored_columns is not None:
            yield
            return

        def pack(tensor: Tensor) -> Tensor:
            # _base: the tensor that a view was taken of. A transposed weight is still a parameter.
            is_parameter = isinstance(tensor, torch.nn.Parameter) or isinstance(
                tensor._base, torch.nn.Parameter
            )
            if not is_parameter:
                # By address: several saved tensors may be views of one storage.
                storage = tensor.untyped_storage()
                self.saved_bytes[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            yield


def free_memory(device: torch.device) -> float:
    """Return the free bytes: on CUDA those that the largest step left, on a CPU those available."""
    if device.type == "cuda":
        # PyTorch's caching allocator keeps reserved memory. Reserved memory beyond the peak of the
        # live tensors is free too.
        free, _ = torch.cuda.mem_get_info(device)
        return float(
            free + torch.cuda.memory_reserved(device) - torch.cuda.max_memory_allocated(device)
        )
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return 1024.0 * next(
            int(line.split()[1]) for line in lines if line.startswith("MemAvailable")
        )
    except (OSError, StopIteration):  # not Linux
        return float(os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))


def _smallest_over_ranks(value: int, device: torch.device) -> int:
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return value
    smallest = torch.tensor(value, device=device)
    torch.distributed.all_reduce(smallest, op=torch.distributed.ReduceOp.MIN)
    return int(smallest)
