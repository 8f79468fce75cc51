"""Out of memory on the device, as an error that names the setting to change."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from pipeline.errors import StageError

ON_CPU = "DefaultCPUAllocator: can't allocate memory"  # in a RuntimeError without a type of its own


@contextlib.contextmanager
def out_of_memory_named(key: str, images: int, remedy: str, when: str = "") -> Iterator[None]:
    """Turn PyTorch's error into one for the user.

    Args:
        key: of the job; decides how many images are computed at once.
        images: its value.
        remedy: what to change.
        when: of the message, such as " before the first step".

    Raises:
        StageError: instead of ``torch.OutOfMemoryError``, or of the error of a CPU.
    """
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, torch.OutOfMemoryError) and ON_CPU not in str(error):
            raise
        # Of PyTorch's text, the first sentences say what was wanted and what was free; advice on
        # the allocator follows.
        detail = str(error).partition(" If reserved")[0]
        raise StageError(
            f"out of memory on the device{when} with {images} images per process: {detail}",
            place=key,
            remedy=remedy,
        ) from error
