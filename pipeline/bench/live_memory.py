"""Peak of live tensor bytes. Allocators and library caches blur a process's peak; the storages alive do not."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of tensor storages that come to life inside (``current``), and their ``peak``.

    ``known``: tensors that existed before and are not counted (parameters, gradients, inputs). What a compiled function
    allocates is seen when its result is first used.
    """

    def __init__(self, known: Iterable[Tensor] = ()) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.current = self.peak = 0
        self._seen = {tensor.untyped_storage()._cdata for tensor in known}

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Let compiled functions run as they are, inside and afterwards (else they run as single operations from then on)."""
        return True

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        for argument in args:
            self._count(argument)
        result = function(*args, **(kwargs or {}))
        for value in result if isinstance(result, tuple | list) else (result,):
            self._count(value)
        return result

    def _count(self, value: Any) -> None:
        if not isinstance(value, Tensor):
            return
        storage = value.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._seen:
            return
        self._seen.add(key)
        self.current += size
        self.peak = max(self.peak, self.current)
        weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self.current -= size
        self._seen.discard(key)
