"""Optimizer state outside the device's memory: in the host's, or in files on a local disk.

DeepSpeed keeps master weights and moments on the host (``offload_optimizer: cpu``) and updates them
there. With a folder, the tensors that only the update reads (moments and the average) lie in files
that are mapped into memory: the system holds what fits and writes the rest to the disk.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from pipeline.errors import StageError
from pipeline.files import temporary_name

Allocate = Callable[[Tensor], Tensor]  # a tensor of zeros in fp32, of the shape of the argument


def allocator(offload_optimizer: str) -> Allocate:
    """How the tensors of the optimizer's state are allocated, by the job's key."""
    if offload_optimizer in ("none", "cpu"):
        return zeros_beside
    # Mapped files instead of DeepSpeed's own swapping: that needs a compiled extension, ZeRO 3, and
    # empties the tensors that checkpoints, the average and the clamp of alpha work with.
    folder = Path(offload_optimizer)
    return lambda like: zeros_on_disk(like, folder)


def zeros_beside(like: Tensor) -> Tensor:
    """Zeros where the argument lies."""
    return torch.zeros_like(like, dtype=torch.float32)


def zeros_on_disk(like: Tensor, folder: Path) -> Tensor:
    """Zeros in a file of a folder.

    Raises:
        StageError: the file cannot be created, for example because the disk is full.
    """
    if not like.numel():
        return torch.zeros(like.shape)
    path = folder / temporary_name("optimizer")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with open(path, "wb") as file:
            # Reserved now: a disk that is full later would end the process by a signal.
            os.posix_fallocate(file.fileno(), 0, 4 * like.numel())
        values = torch.from_file(str(path), shared=True, size=like.numel(), dtype=torch.float32)
    except OSError as error:
        raise StageError(
            f"no room for the optimizer's state: {error.strerror or error}",
            place=str(folder),
            remedy="free some disk space, or set offload_optimizer to another folder or to cpu",
        ) from None
    finally:
        # The name goes at once, the content with the process, however it ends.
        path.unlink(missing_ok=True)
    return values.view(like.shape)


def combine_norms_as_on_device(optimizer: Any) -> None:
    """Let DeepSpeed combine the norms of offloaded gradients as it does on the device.

    It adds the same numbers in two ways (0.19.8). The results differ in the last bit on some
    processors, and gradients are clipped by them: offload would change the weights.
    """
    norm_of_offloaded = optimizer.complete_grad_norm_calculation_for_cpu_offload

    def norm(parameters: Sequence[Tensor]) -> Tensor:
        norms = optimizer.norm_for_param_grads
        known = [each for each in parameters if optimizer.get_param_id(each) in norms]
        if not known:
            return cast(Tensor, norm_of_offloaded(parameters))
        # The norm of a single number is that number.
        values = [torch.as_tensor(norms[optimizer.get_param_id(each)]) for each in known]
        return cast(Tensor, optimizer.get_grad_norm_direct(values, known))

    optimizer.complete_grad_norm_calculation_for_cpu_offload = norm
