"""Out of memory on the device, as an error that names the setting to change."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from pipeline.errors import StageError


@contextlib.contextmanager
def out_of_memory_named(key: str, images: int, remedy: str) -> Iterator[None]:
    """Turn PyTorch's error into one for the user.

    Args:
        key: of the job; decides how many images are computed at once.
        images: its value.
        remedy: what to change.

    Raises:
        StageError: instead of ``torch.OutOfMemoryError``.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        # Of PyTorch's text, the first sentences say what was wanted and what was free; advice on
        # the allocator follows.
        detail = str(error).partition(" If reserved")[0]
        raise StageError(
            f"out of memory on the device with {images} images per process: {detail}",
            place=key,
            remedy=remedy,
        ) from error
