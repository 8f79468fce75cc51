"""Whether PyTorch is turning the network into a program, instead of computing with it."""

from __future__ import annotations

import torch


def jit_tracing() -> bool:
    """Return true inside torch.jit.trace."""
    # torch.compile cannot trace the question itself: each one would cut its graph in two.
    if torch.compiler.is_compiling():
        return False
    tracing: bool = torch._C._is_tracing()
    return tracing


def exporting() -> bool:
    """Return true if the program is for other runtimes: torch.export, ONNX or torch.jit.trace."""
    return torch.compiler.is_exporting() or jit_tracing()


def tracing() -> bool:
    """Return true inside torch.compile, torch.export and torch.jit.trace."""
    return torch.compiler.is_compiling() or jit_tracing()
