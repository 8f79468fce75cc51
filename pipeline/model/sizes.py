"""Sizes of the named networks, for those who build one without a job.

The same values as in ``configs/model/*.yaml``, which jobs read. There the stem of revcol_own_images
follows the images; here its stride is the published one unless it is given.
"""

from __future__ import annotations

from typing import TypedDict

from pipeline.model.spec import Activations, Init, StemStride


class Size(TypedDict, total=False):
    """Arguments of ``NetworkSpec`` that a name stands for."""

    channels: list[int]
    depths: list[int]
    columns: int
    huge: bool
    block: str
    stem_stride: StemStride
    init: Init
    layer_scale: float
    activations: Activations
    drop_path: float
    fraction_bits: int


SIZES: dict[str, Size] = {
    # For small images and CPUs.
    "revcol_own_images": {
        "channels": [32, 64, 64, 64],
        "depths": [1, 1, 1, 1],
        "columns": 2,
        "block": "residual",
        "init": "fan_in",
        "layer_scale": 1,
        "activations": "stored",
    },
    "revcol_cifar": {
        "channels": [32, 64, 128, 128],
        "depths": [1, 1, 1, 1],
        "columns": 2,
        "block": "residual",
        "stem_stride": 2,
        "init": "fan_in",
        "activations": "stored",
    },
    "revcol_quickstart": {
        "channels": [16, 32, 64, 128],
        "depths": [1, 1, 1, 1],
        "columns": 4,
        "init": "fan_in",
        "layer_scale": 1,
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
