"""Classifies image files in batches with an exported model."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from pipeline.errors import DataError
from pipeline.export.reload import Exported, Prediction


@dataclass(frozen=True)
class ClassifiedFile:
    """The most probable classes of an image, best first; or why the file cannot be used."""

    image: str
    classes: list[Prediction]
    error: str = ""


def classify_files(
    model: Exported, images: Sequence[Path], *, best: int, batch: int
) -> Iterator[ClassifiedFile]:
    """Classify every file, in order. A file that is no image does not end the work.

    Args:
        best: classes per image.
        batch: images in one forward pass.
    """

    def prepare(image: Path) -> Tensor | DataError:
        try:
            return model.prepare(image)
        except DataError as error:
            return error

    # Threads decode: both decoders release Python's lock.
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for start in range(0, len(images), batch):
            files = images[start : start + batch]
            prepared = list(pool.map(prepare, files))
            tensors = [tensor for tensor in prepared if isinstance(tensor, Tensor)]
            predictions = iter(model.classify(torch.cat(tensors), best) if tensors else [])
            for file, result in zip(files, prepared, strict=True):
                if isinstance(result, DataError):
                    yield ClassifiedFile(str(file), [], result.cause)
                else:
                    yield ClassifiedFile(str(file), next(predictions))
