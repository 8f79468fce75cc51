"""Element-wise kernels of the fixed-point stream: eager, or each compiled into one loop.

``kernels_for`` is the only place that decides which. Both give the same bits (see ``fixed_point``).
"""

from __future__ import annotations

import logging
import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Generic, ParamSpec, Protocol, TypeVar

import torch
from torch import Tensor

from pipeline.model import fixed_point
from pipeline.model.fixed_point import GridAlpha, Resolution

# Elements of the largest map from which compilation is worth its time on a CPU.
MIN_ELEMENTS_TO_COMPILE = 1 << 18

Options = dict[str, str | int | bool | Callable[..., object]]
P = ParamSpec("P")
R = TypeVar("R")

logger = logging.getLogger(__name__)


class Decode(Protocol):
    """Signature of ``fixed_point.decode``."""

    def __call__(
        self,
        f: Tensor,
        stream: Tensor,
        *,
        remainder: Tensor,
        gradient: Tensor,
        alpha: GridAlpha,
        resolution: Resolution,
    ) -> tuple[Tensor, Tensor, Tensor]: ...


@dataclass(frozen=True, kw_only=True)
class StreamKernels:
    """The functions of ``fixed_point`` with the same names."""

    start: Callable[[Tensor, Resolution], tuple[Tensor, Tensor]]
    add: Callable[[Tensor, Tensor, GridAlpha, Resolution], Tensor]
    encode: Callable[[Tensor, Tensor, GridAlpha, Resolution, torch.dtype], tuple[Tensor, Tensor]]
    check_start: Callable[[Tensor, Tensor, Resolution], Tensor]
    decode: Decode


EAGER = StreamKernels(
    start=fixed_point.start,
    add=fixed_point.add,
    encode=fixed_point.encode,
    check_start=fixed_point.check_start,
    decode=fixed_point.decode,
)


def kernels_for(fused: str, device: torch.device, elements: int) -> StreamKernels:
    """Choose the kernels for a network whose largest map has ``elements`` elements.

    ``fused`` is 'eager', 'compiled', or 'auto': compiled on CUDA, and on a CPU if it has a C++
    compiler and the maps are large enough.
    """
    if fused == "compiled":
        return compiled_kernels()
    too_small = elements < MIN_ELEMENTS_TO_COMPILE
    if fused == "eager" or device.type not in ("cpu", "cuda") or too_small:
        return EAGER
    if device.type == "cpu" and not _has_cpp_compiler():
        _warn_eager("no C++ compiler found (g++, or the one that CXX names)")
        return EAGER
    return compiled_kernels()


@cache
def compiled_kernels() -> StreamKernels:
    """Return kernels that compile at their first call, once for all shapes."""
    options = _compile_options()
    return StreamKernels(
        start=_CompiledKernel(fixed_point.start, options),
        add=_CompiledKernel(fixed_point.add, options),
        encode=_CompiledKernel(fixed_point.encode, options),
        check_start=_CompiledKernel(fixed_point.check_start, options),
        decode=_CompiledKernel(fixed_point.decode, options),
    )


class _CompiledKernel(Generic[P, R]):
    """One kernel under torch.compile. Runs eagerly from then on if compilation fails."""

    def __init__(self, function: Callable[P, R], options: Options) -> None:
        self.function = function
        self.compiled: Callable[P, R] | None = torch.compile(
            function, dynamic=True, options=options
        )

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        if self.compiled is not None:
            try:
                return self.compiled(*args, **kwargs)
            # A broken compiler can raise anything. It raises before the kernel runs, so the stream
            # is unchanged and the eager call below is safe.
            except Exception as error:
                self.compiled = None
                _warn_eager(f"compilation failed: {str(error).strip().splitlines()[0]}")
        return self.function(*args, **kwargs)


def _compile_options() -> Options:
    """Options of torch.compile. On a CPU: plain loops, vectorised by the C++ compiler.

    Inductor's own vector code converts float64 through memory, which is several times slower than
    plain loops (simdlen 1). Its default flags keep g++ from vectorising those loops: loop
    vectorisation is off, and a loop with a branch stays scalar in case its arithmetic traps. The
    option ``cpp.march`` is the only place that can carry additional flags. They change no result.
    """
    from torch._inductor import list_options  # imported here: it takes seconds

    options: Options = {"cpp.simdlen": 1}
    # clang vectorises without these flags, and older PyTorch versions lack the option.
    if sys.platform != "linux" or "clang" in _cpp_compiler() or "cpp.march" not in list_options():
        return options
    machine = os.environ.get("TORCHINDUCTOR_CPP_MARCH") or "native"
    return options | {"cpp.march": f"{machine} -ftree-loop-vectorize -fno-trapping-math"}


def _cpp_compiler() -> str:
    """Name of the C++ compiler that inductor calls."""
    return os.environ.get("CXX", "g++")


@cache
def _has_cpp_compiler() -> bool:
    return shutil.which(_cpp_compiler()) is not None


@cache  # warns once per reason
def _warn_eager(reason: str) -> None:
    logger.warning(
        "element-wise kernels of the reversible columns run eagerly (slower): %s", reason
    )
