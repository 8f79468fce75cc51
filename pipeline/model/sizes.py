"""Sizes of the named networks, for those who build one without a job.

The same values as in ``configs/model/*.yaml``, which jobs read.
"""

from __future__ import annotations

from typing import TypedDict


class Size(TypedDict, total=False):
    """Arguments of ``NetworkSpec`` that a name stands for."""

    channels: list[int]
    depths: list[int]
    columns: int
    drop_path: float
    huge: bool
    fraction_bits: int


SIZES: dict[str, Size] = {
    # For small images on a CPU.
    "revcol_cifar": {
        "channels": [16, 32, 64, 128],
        "depths": [1, 1, 2, 1],
        "columns": 4,
        "drop_path": 0.0,
    },
    "revcol_quickstart": {
        "channels": [16, 32, 64, 128],
        "depths": [1, 1, 2, 1],
        "columns": 4,
        "drop_path": 0.0,
    },
    # As published (Cai et al., ICLR 2023).
    "revcol_tiny": {
        "channels": [64, 128, 256, 512],
        "depths": [2, 2, 4, 2],
        "columns": 4,
        "drop_path": 0.1,
    },
    "revcol_small": {
        "channels": [64, 128, 256, 512],
        "depths": [2, 2, 4, 2],
        "columns": 8,
        "drop_path": 0.3,
    },
    "revcol_base": {
        "channels": [72, 144, 288, 576],
        "depths": [1, 1, 3, 2],
        "columns": 16,
        "drop_path": 0.4,
    },
    "revcol_large": {
        "channels": [128, 256, 512, 1024],
        "depths": [1, 2, 6, 2],
        "columns": 8,
        "drop_path": 0.5,
    },
    "revcol_xlarge": {
        "channels": [224, 448, 896, 1792],
        "depths": [1, 2, 6, 2],
        "columns": 8,
        "drop_path": 0.5,
    },
    "revcol_huge": {
        "channels": [360, 720, 1440, 2880],
        "depths": [1, 2, 6, 2],
        "columns": 8,
        "drop_path": 0.5,
        "huge": True,
        "fraction_bits": 16,
    },
}


def models() -> list[str]:
    """Return the names that ``build`` knows, smallest network first."""
    return list(SIZES)


def size_of(name: str) -> Size:
    """Return the size that a name stands for. Raises ValueError if there is none."""
    if name not in SIZES:
        raise ValueError(f"no model is called {name!r}; there are {', '.join(SIZES)}")
    return SIZES[name]
