"""The parameters and buffers that a level computed with, for its recompute.

Autograd must know what parameters each level reads, or ``torch.autograd.grad``, ``functional_call``
and DistributedDataParallel would take them for unused. So they are inputs of the level's autograd
function, which returns their gradients. The recompute then runs on aliases (``substituted``):

* hooks on a parameter fire once, when autograd receives its gradient, and not in the recompute too;
* after ``functional_call`` the module holds its own parameters again, but the recompute must read
  those of the call.

Parameters that another library shards are the exception. ZeRO-3 and FSDP2 put the whole values into
the module while the level runs, so their parameters are not the tensors that the level reads, and
their hooks expect gradients to be accumulated inside the recompute.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import cast

import torch
from torch import Tensor, nn

# Ends every error about something that only plain autograd can do.
USE_STORED = "Build the network with activations='stored', which is plain autograd"


class LevelTensors:
    """Parameters and buffers of one level, as one forward pass found them.

    Attributes:
        sharded: the parameters are sharded, so the recompute accumulates their gradients.
        trainable: the parameters that get a gradient, unless they are sharded.
    """

    def __init__(self, level: nn.Module) -> None:
        tables = [
            cast(dict[str, Tensor], table)
            for module in level.modules()
            for table in (module._parameters, module._buffers)
        ]
        # Each tensor with the table of its module and its name there.
        self._entries = [
            (table, name, tensor)
            for table in tables
            for name, tensor in table.items()
            if tensor is not None
        ]
        trainable = [tensor for _, _, tensor in self._entries if tensor.requires_grad]
        self.sharded = any(_is_sharded(tensor) for tensor in trainable)
        self.trainable = [] if self.sharded else trainable
        self._versions = [tensor._version for tensor in self.trainable]

    def check_unchanged(self, column: int, level: int) -> None:
        """Raise RuntimeError if a parameter was changed in place since the forward pass."""
        for tensor, version in zip(self.trainable, self._versions, strict=True):
            if tensor._version != version:
                name = next(name for _, name, entry in self._entries if entry is tensor)
                raise RuntimeError(
                    f"parameter {name!r} of column {column}, level {level} was changed in place "
                    "between the forward and the backward pass, so its gradient cannot be "
                    "computed: change parameters after backward(). (activations='stored' does not "
                    "allow it either.)"
                )

    @contextmanager
    def substituted(self) -> Iterator[list[Tensor]]:
        """Put aliases of the recorded tensors into the level. Gives those of ``trainable``."""
        if self.sharded:  # the library's hooks put the whole values there
            yield []
            return
        replaced = [table[name] for table, name, _ in self._entries]
        aliases = []
        for table, name, tensor in self._entries:
            table[name] = _alias(tensor)
            if tensor.requires_grad:
                aliases.append(table[name])
        try:
            yield aliases
        finally:
            for (table, name, _), tensor in zip(self._entries, replaced, strict=True):
                table[name] = tensor


def _is_sharded(tensor: Tensor) -> bool:
    # FSDP2's parameters are a subclass of Tensor (DTensor), ZeRO-3 gives its own a number.
    return type(tensor) not in (Tensor, nn.Parameter) or hasattr(tensor, "ds_id")


def _alias(tensor: Tensor) -> Tensor:
    """Return a leaf with the same values. Its type is the same, so compiled code still fits it."""
    if not tensor.requires_grad:
        return tensor
    alias = tensor.detach()
    return nn.Parameter(alias) if isinstance(tensor, nn.Parameter) else alias.requires_grad_()


def refuse_create_graph() -> None:
    """Raise RuntimeError in a backward pass that must itself be differentiable."""
    # Autograd runs a backward pass with gradients on only if create_graph=True.
    if torch.is_grad_enabled():
        raise RuntimeError(
            "exactly reversible columns cannot be differentiated twice (create_graph=True): their "
            f"backward pass keeps no graph. {USE_STORED}"
        )


def refuse_functorch() -> None:
    """Raise RuntimeError under vmap, grad and the other transforms of torch.func."""
    if torch._C._are_functorch_transforms_active():
        raise RuntimeError(
            "torch.func (vmap, grad, jvp, ...) cannot transform exactly reversible columns: their "
            f"backward pass runs the levels again. {USE_STORED}"
        )
