"""Memory of this process's tensors on a CPU, whose allocator keeps no count."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator

from torch import Tensor
from torch.nn import Parameter
from torch.profiler import ProfilerActivity, profile

ALLOCATION = "[memory]"  # name of the profiler's events of allocations and releases


def live_tensor_bytes() -> float:
    """Bytes of the tensors that exist, each storage once."""
    sizes: dict[int, int] = {}
    for value in gc.get_objects():
        # Exactly these types: compilers keep tensors of other types that have no memory.
        if type(value) in (Tensor, Parameter) and not value.is_meta:
            for tensor in (value, value.grad if value.is_leaf else None):
                if tensor is not None:
                    storage = tensor.untyped_storage()
                    sizes[storage._cdata] = storage.nbytes()
    return float(sum(sizes.values()))


class PeakBytes:
    """Largest number of bytes that were allocated inside a block, beyond those before it."""

    def __init__(self) -> None:
        self.peak = 0.0

    @contextlib.contextmanager
    def counted(self) -> Iterator[None]:
        """Count the allocations of the block. Compiled code is counted too."""
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
            yield
        assert recorded.profiler is not None
        assert recorded.profiler.kineto_results is not None
        events = [
            event
            for event in recorded.profiler.kineto_results.events()
            if event.name() == ALLOCATION
        ]
        current = 0.0
        for event in sorted(events, key=lambda event: event.start_ns()):
            current += event.nbytes()  # negative when memory is released
            self.peak = max(self.peak, current)
