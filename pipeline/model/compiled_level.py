"""torch.compile for the function of a level, without its silent fallback.

All levels share one Python function, and torch.compile keeps one graph per kind of input. Example:
RevCol-H needs 7 per image size (column 0 and the others, four levels each; level 3 is the same in
both), so training and evaluation at two sizes need 14. PyTorch stops at 8 graphs per function and
runs the rest uncompiled, with nothing but a line in the log.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, ParamSpec, TypeVar

import torch

GRAPHS_PER_SHAPE = 16  # of the images: 7 are needed, more if gradients stop somewhere
SHAPES = 4  # of the images, in one process

P = ParamSpec("P")
R = TypeVar("R")


class TooManyGraphs(RuntimeError):
    """The compiled levels need more graphs than one process is meant to hold."""


class CompiledLevel(Generic[P, R]):
    """A compiled function that raises where torch.compile would give up.

    Raises:
        TooManyGraphs: one process has used more than ``SHAPES`` shapes of images.
    """

    def __init__(self, function: Callable[P, R]) -> None:
        self.compiled: Callable[P, R] = torch.compile(function, dynamic=False)

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        # Imported here: it takes seconds, and networks that are not compiled do without.
        from torch._dynamo import config as dynamo_config
        from torch._dynamo.exc import FailOnRecompileLimitHit

        # Only around the own calls: the settings of PyTorch are global.
        limit = GRAPHS_PER_SHAPE * SHAPES
        try:
            with dynamo_config.patch(recompile_limit=limit, fail_on_recompile_limit_hit=True):
                return self.compiled(*args, **kwargs)
        except FailOnRecompileLimitHit as error:
            raise TooManyGraphs(
                f"the levels of the network need more than {limit} compiled graphs, "
                f"enough for {SHAPES} shapes of images"
            ) from error
