"""What a process can do for a training before it belongs to one: the imports."""

from __future__ import annotations

import os

from pipeline.runtime import environment


def warm_up(device: str) -> None:
    """Import everything that a training step needs. The process may still train on any device."""
    # DeepSpeed reads its variables when it is imported. No device is touched: a process that stands
    # by must not take memory of a GPU.
    for name, value in environment.deepspeed_import(device).items():
        os.environ.setdefault(name, value)
    import deepspeed  # noqa: F401
    import torch._dynamo
    import torch._inductor.compile_fx  # noqa: F401

    import pipeline.train.trainer  # noqa: F401
