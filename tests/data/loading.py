"""Loaders with short settings, and batches in a form that can be compared."""

from __future__ import annotations

from dataclasses import replace
from itertools import islice
from typing import Any

from pipeline.config.schema import AugmentConfig
from pipeline.data.dataset import Split
from pipeline.data.loader import Batch, TrainLoader

# step -> position -> (sample, label, pixels)
Steps = dict[int, dict[int, tuple[int, int, bytes]]]

SETTINGS: dict[str, Any] = {
    "seed": 3,
    "image_size": 32,
    "augment": AugmentConfig(),
    "global_batch": 24,
    "micro_batch": 24,
    "threads": 2,
}


def train_loader(split: Split, **changes: Any) -> TrainLoader:
    return TrainLoader(split, **(SETTINGS | changes))


def take(loader: TrainLoader, batches: int) -> list[Batch]:
    """The next batches, with their own memory; closes the loader."""
    with loader:
        return [replace(batch, images=batch.images.clone()) for batch in islice(loader, batches)]


def by_step(batches: list[Batch]) -> Steps:
    steps: Steps = {}
    for batch in batches:
        images = zip(batch.images, batch.labels, batch.samples, batch.positions, strict=True)
        for image, label, sample, position in images:
            content = (int(sample), int(label), image.numpy().tobytes())
            steps.setdefault(batch.step, {})[int(position)] = content
    return steps


def merged(parts: list[Steps]) -> Steps:
    """The images of several ranks together."""
    steps: Steps = {}
    for part in parts:
        for step, images in part.items():
            steps.setdefault(step, {}).update(images)
    return steps
