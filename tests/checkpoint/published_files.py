"""Files as the published training code writes them: weights among objects of other libraries."""

from __future__ import annotations

import os
import sys
import types
from collections.abc import Mapping
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from torch import Tensor


class CfgNode(dict[str, object]):
    """A configuration as yacs pickles it: a dictionary of a class of its own, with attributes."""

    def __init__(self, values: Mapping[str, object]) -> None:
        super().__init__(values)
        self.__dict__["__immutable__"] = True


class WritesAFile:
    """Unpickled by an unrestricted reader, it writes a file."""

    def __init__(self, path: Path, *, with_system: bool) -> None:
        self.path = path
        self.with_system = with_system

    def __reduce__(self) -> tuple[object, ...]:
        if self.with_system:
            return os.system, (f"touch {self.path}",)
        return exec, (f"open({str(self.path)!r}, 'w')",)


def write_published(
    path: Path,
    weights: Mapping[str, Tensor],
    *,
    ema: Mapping[str, Tensor] | None = None,
    image_size: int = 224,
    extra: object = None,
) -> Path:
    """Write ``weights`` (published names) in the layout of the published ``save_checkpoint``."""
    yacs = types.ModuleType("yacs")
    config = types.ModuleType("yacs.config")
    config.CfgNode = CfgNode  # type: ignore[attr-defined]
    content = {
        "model": dict(weights),
        "optimizer": {"state": {0: {"exp_avg": torch.zeros(3)}}, "param_groups": [{"lr": 0.1}]},
        "max_accuracy": np.float64(82.2),
        "epoch": 299,
        "state_dict_ema": None if ema is None else dict(ema),
        "input": input,
        "config": CfgNode({"DATA": CfgNode({"IMG_SIZE": image_size})}),
        "extra": extra,
    }
    modules = {"yacs": yacs, "yacs.config": config}
    with (
        mock.patch.dict(sys.modules, modules),
        mock.patch.object(CfgNode, "__module__", config.__name__),
    ):
        torch.save(content, path)
    return path
