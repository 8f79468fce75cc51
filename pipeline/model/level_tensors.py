"""The parameters and buffers that a level computed with, for its recompute.

Autograd must know what parameters each level reads, or ``torch.autograd.grad``, ``functional_call``
and DistributedDataParallel would take them for unused. So they are inputs of the level's autograd
function, which returns their gradients. The recompute reads the same tensors, or aliases of them
(``substituted``) where these would not do:

* a hook on a parameter must fire once, when autograd receives its gradient, and not in the
  recompute too;
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
        # Each tensor with the table of its module and its name there.
        self._entries = [
            (table, name, tensor)
            for table in _tables(level)
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

    def _still_there(self) -> bool:
        """Whether the level holds the recorded tensors, and no hook on them would fire twice."""
        return all(
            table.get(name) is tensor and not tensor._backward_hooks
            for table, name, tensor in self._entries
        )

    @contextmanager
    def substituted(self) -> Iterator[list[Tensor]]:
        """Make the level read the recorded values. Gives the leaves for those of ``trainable``."""
        # The hooks of a library that shards put the whole values there.
        if self.sharded or self._still_there():
            yield self.trainable
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


def _tables(module: nn.Module) -> Iterator[dict[str, Tensor]]:
    """Yield the tables of parameters and buffers of a module and those inside it."""
    # Every forward pass asks for them, and nn.Module.modules() takes three times as long.
    if module._parameters:
        yield cast(dict[str, Tensor], module._parameters)
    if module._buffers:
        yield cast(dict[str, Tensor], module._buffers)
    for child in module._modules.values():
        if child is not None:
            yield from _tables(child)


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
