"""Imports torchvision, also its build for CUDA beside a CPU build of torch."""

from __future__ import annotations

import functools
import importlib
import sys
from types import ModuleType

import torch


def import_torchvision(module: str = "torchvision") -> ModuleType:
    """Import torchvision, or a module of it.

    Its build for CUDA cannot load its operators beside a CPU build of torch, and its import then
    fails at the first of them ("operator torchvision::nms does not exist"). Networks and transforms
    need none of these operators: it suffices that their names are known.

    Raises:
        ImportError: torchvision is not installed.
    """
    try:
        return importlib.import_module(module)
    except RuntimeError as error:
        if "does not exist" not in str(error):
            raise
    _declare_operators()
    for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
        del sys.modules[name]  # what the failed import left behind
    return importlib.import_module(module)


@functools.cache  # the declarations end with the object that holds them
def _declare_operators() -> torch.library.Library:
    library = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    return library
