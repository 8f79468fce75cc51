"""The stream's element-wise passes, as single operations or each compiled into one; the one place that decides which."""

from __future__ import annotations

import logging
import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from pipeline.model import fixed_point

WORTH_COMPILING = (
    1 << 18
)  # elements of the largest map: below, compilation takes longer than it saves
logger = logging.getLogger(__name__)


def _options() -> dict[str, Any]:
    """Of torch.compile: on a CPU plain loops, which the C++ compiler makes vector code of.

    Inductor's own vector code converts float64 by way of memory (decode: 9.4 ms for 1.8 million elements), and its flags
    keep g++ from doing better (3.8 ms): no loop is made vector code, nor one with a choice in it where an arithmetic trap
    might be set. The name of the machine is the one place where flags can be added (1.7 ms); they change no result.
    """
    from torch._inductor import list_options  # takes a while

    options: dict[str, Any] = {"cpp.simdlen": 1}
    if sys.platform != "linux" or "clang" in _cxx() or "cpp.march" not in list_options():
        return options
    machine = os.environ.get("TORCHINDUCTOR_CPP_MARCH") or "native"
    return options | {"cpp.march": f"{machine} -ftree-loop-vectorize -fno-trapping-math"}


def _cxx() -> str:
    """The C++ compiler that inductor calls."""
    return os.environ.get("CXX", "g++")


class _Compiled:
    """One pass under torch.compile; the same pass as single operations where compilation fails."""

    def __init__(self, function: Callable[..., Any], options: dict[str, Any]) -> None:
        self.function = function
        self.compiled: Callable[..., Any] | None = torch.compile(
            function, dynamic=True, options=options
        )

    def __call__(self, *arguments: Any) -> Any:
        if self.compiled is not None:
            try:
                return self.compiled(*arguments)
            except Exception as error:  # whatever a broken compiler raises; nothing has run yet
                self.compiled = None
                _say_slow(f"compilation failed: {str(error).strip().splitlines()[0]}")
        return self.function(*arguments)


@dataclass(frozen=True)
class StreamKernels:
    """``stream``'s functions of the same names."""

    start: Callable[..., tuple[Tensor, Tensor]]
    add: Callable[..., Tensor]
    encode: Callable[..., tuple[Tensor, Tensor]]
    check: Callable[..., Tensor]
    decode: Callable[..., tuple[Tensor, Tensor, Tensor]]


EAGER = StreamKernels(
    fixed_point.start, fixed_point.add, fixed_point.encode, fixed_point.check, fixed_point.decode
)


@cache
def compiled() -> StreamKernels:
    """Compiled at the first call of each, for all shapes."""
    options = _options()
    functions = (
        fixed_point.start,
        fixed_point.add,
        fixed_point.encode,
        fixed_point.check,
        fixed_point.decode,
    )
    return StreamKernels(*(_Compiled(function, options) for function in functions))


@cache
def _say_slow(reason: str) -> None:
    logger.warning(
        "the element-wise passes of the reversible columns run as single operations, slower: %s",
        reason,
    )


@cache
def _cpu_compiler() -> bool:
    return shutil.which(_cxx()) is not None


def choose(fused: str, device: torch.device, elements: int) -> StreamKernels:
    """``fused``: 'eager', 'compiled', or 'auto': compiled on CUDA, and on a CPU with a C++ compiler for maps worth it."""
    if fused == "compiled":
        return compiled()
    if fused == "eager" or device.type not in ("cpu", "cuda") or elements < WORTH_COMPILING:
        return EAGER
    if device.type == "cpu" and not _cpu_compiler():
        _say_slow("there is no C++ compiler (g++, or the one that CXX names)")
        return EAGER
    return compiled()
