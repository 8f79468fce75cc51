"""Peak memory of live tensors, independent of allocators and library caches.

The resident memory of a process also contains what allocators and libraries keep for later, which
hides differences of a few MiB. Summing the sizes of the tensor storages that are alive is exact.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of tensor storages that are created inside this context.

    A compiled function's intermediate tensors are not seen, and its results are counted when they
    are first used.

    Args:
        known: tensors that exist already and are not counted (parameters, gradients, inputs).

    Attributes:
        current: bytes that are alive now.
        peak: largest value of ``current``.
    """

    def __init__(self, known: Iterable[Tensor] = ()) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.current = 0
        self.peak = 0
        self._seen = {tensor.untyped_storage()._cdata for tensor in known}

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Let compiled functions run compiled inside this context, and afterwards.

        By default PyTorch runs them eagerly from their first call under a dispatch mode on.
        """
        return True

    def __torch_dispatch__(
        self,
        function: Callable[..., object],
        types: object,
        args: Iterable[object] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        # Arguments too: a compiled function may have created them.
        for argument in args:
            self._count(argument)
        result = function(*args, **(kwargs or {}))
        for value in result if isinstance(result, tuple | list) else (result,):
            self._count(value)
        return result

    def _count(self, value: object) -> None:
        if not isinstance(value, Tensor):
            return
        # Views share a storage, so count storages and not tensors.
        storage = value.untyped_storage()
        key = storage._cdata
        if key in self._seen:
            return
        size = storage.nbytes()
        self._seen.add(key)
        self.current += size
        self.peak = max(self.peak, self.current)
        weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self.current -= size
        self._seen.discard(key)
