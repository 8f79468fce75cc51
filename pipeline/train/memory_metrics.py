"""Memory of a process: what its training state takes, and its peak."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator

import psutil
import torch
from torch import Tensor

from pipeline.monitor import tags
from pipeline.runtime.tensor_memory import PeakBytes, live_tensor_bytes
from pipeline.train.zero_state import ShardedState

MIB = 2.0**20


class MemoryMetrics:
    """Sizes of a process's tensors on its device.

    A GPU's allocator knows the peak of all tensors. On a CPU nobody counts them, so the allocations
    of one step are recorded (``counted``).
    """

    def __init__(self, state: ShardedState, device: torch.device) -> None:
        self._device = device
        # Under ZeRO-3 a parameter is empty, and ``ds_tensor`` is the share of this rank.
        weights = (getattr(p, "ds_tensor", p.data) for p in state.parameters.values())
        optimizer = (flat for flats in state.flats_by_kind().values() for flat in flats)
        self._sizes = {
            tags.WEIGHTS_MIB: _bytes(weights) / MIB,
            tags.OPTIMIZER_MIB: _bytes(t for t in optimizer if t.device == device) / MIB,
        }

    @contextlib.contextmanager
    def counted(self, wanted: bool) -> Iterator[None]:
        """Count the tensors of a CPU inside the block, if ``wanted``; no effect on a GPU."""
        if self._device.type != "cpu" or not wanted:
            yield
            return
        state = live_tensor_bytes()
        allocated = PeakBytes()
        with allocated.counted():
            yield
        self._sizes[tags.STATE_MIB] = state / MIB
        self._sizes[tags.PEAK_MIB] = (state + allocated.peak) / MIB

    def scalars(self) -> dict[str, float]:
        """The sizes so far; call it between two steps. Does not wait for the device."""
        scalars = self._sizes | {tags.RSS_MIB: psutil.Process().memory_info().rss / MIB}
        if self._device.type == "cuda":
            scalars[tags.STATE_MIB] = torch.cuda.memory_allocated() / MIB
            scalars[tags.PEAK_MIB] = torch.cuda.max_memory_allocated() / MIB
        return scalars


def _bytes(tensors: Iterable[Tensor]) -> float:
    """Bytes of the storages of these tensors, each counted once."""
    storages = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}
    return float(sum(storages.values()))
