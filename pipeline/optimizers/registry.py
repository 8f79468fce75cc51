"""Registry of optimizers: every file in the folder ``kinds`` is one optimizer.

To add one, add one file there. Its docstring's first line describes it, and it assigns:

    KEYS = ("betas", "eps")               keys of a training stage: arguments of its constructor
    MOMENTS = ("exp_avg", "exp_avg_sq")   tensors of its state with one value per weight
    OPTIMIZER = torch.optim.AdamW         a torch optimizer; it never waits for the device

The configuration reads names, descriptions, ``KEYS`` and ``MOMENTS`` without importing the file
(no torch). The engine and the checkpoints use the rest.
"""

from __future__ import annotations

import ast
import functools
import importlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline import plugins

if TYPE_CHECKING:
    import torch

_FOLDER = Path(__file__).parent / "kinds"


@dataclass(frozen=True)
class OptimizerFacts:
    """What the configuration knows about an optimizer."""

    description: str
    keys: tuple[str, ...]  # keys of a training stage that it reads, besides the common ones
    moments: tuple[str, ...]  # tensors of its state that checkpoints save by ranges of weights


@dataclass(frozen=True)
class OptimizerKind:
    """An optimizer's class and its state.

    ``moments`` as in its facts; they start at zero. A step count is in ``state[weight]["step"]``,
    if there is one.
    """

    optimizer: type[torch.optim.Optimizer]
    moments: tuple[str, ...]


@functools.cache
def facts() -> dict[str, OptimizerFacts]:
    """Return the facts of every optimizer, keyed by the name of its file and sorted by it.

    Raises:
        ValueError: a file in ``kinds`` has no docstring or no literal ``KEYS`` or ``MOMENTS``.
    """
    return {name: _read(path) for name, path in plugins.files(_FOLDER).items()}


def kind(name: str) -> OptimizerKind:
    """Import an optimizer. Raises KeyError if none has this name."""
    if name not in facts():
        raise KeyError(name)
    module = importlib.import_module(f"pipeline.optimizers.kinds.{name}")
    return OptimizerKind(module.OPTIMIZER, module.MOMENTS)


def readers(key: str) -> list[str]:
    """The optimizers that read ``key``: for "eps", adamw and lamb."""
    return [name for name, known in facts().items() if key in known.keys]


def _read(path: Path) -> OptimizerFacts:
    description = plugins.description(path)
    return OptimizerFacts(description, _literals(path, "KEYS"), _literals(path, "MOMENTS"))


def _literals(path: Path, name: str) -> tuple[str, ...]:
    assigned = plugins.assigned(path, name)
    try:
        return tuple(ast.literal_eval(assigned))
    except (ValueError, TypeError):
        raise ValueError(f"{path}: {name} must be a tuple of literals") from None
