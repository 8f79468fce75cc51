"""Describes weights that no description lies beside: published ones, and files copied alone."""

from __future__ import annotations

from pathlib import Path

from pipeline.checkpoint.architecture import architecture_of
from pipeline.checkpoint.description import WeightsDescription
from pipeline.checkpoint.torch_file import WHOLE
from pipeline.checkpoint.weights_reader import WeightsReader
from pipeline.sources.class_lists import class_list

PUBLISHED_IMAGE_SIZE = 224  # pixels, where the file states none
# Published heads are recognised by their number of outputs, whose order is that of these lists.
_CLASS_LISTS = {1000: "imagenet1k", 21841: "fall11_21841", 21843: "google_21843"}


def describe(path: Path, entry: str = "") -> WeightsDescription:
    """What names and shapes of the parameters show, and for published weights what is known.

    Raises:
        CheckpointError: the file cannot be read.
    """
    reader = WeightsReader(path, entry)
    architecture = architecture_of(reader.shapes)
    if architecture is None or "block" not in architecture:
        return WeightsDescription()
    network: dict[str, object] = dict(architecture)
    # Of weights of our own that lost their description, only the network is known: neither the
    # classes nor the image size are in them.
    if not reader.published:
        return WeightsDescription(network=network)
    listed = published_classes(architecture["num_classes"])
    return WeightsDescription(
        network=network,
        classes=class_list(listed) if listed else None,
        image_size=reader.image_size or PUBLISHED_IMAGE_SIZE,
        preprocessing="published",
    )


def published_classes(outputs: int) -> str:
    """The class list of a published head; '' if there is none of this length."""
    return _CLASS_LISTS.get(outputs, "")


def reading_notes(path: Path, entry: str = "") -> list[str]:
    """What a user should know about how a file was read. Raises CheckpointError."""
    reader = WeightsReader(path, entry)
    notes = []
    if reader.entries:
        others = [f"#{name}" for name in reader.entries if name not in (reader.entry, WHOLE)]
        chosen = f"the weights of '{reader.entry}'" if reader.entry != WHOLE else "its weights"
        also = f"; also there: {', '.join(others)}" if others else ""
        notes.append(f"{chosen} are read from {path.name}{also}")
    if reader.stand_ins:
        notes.append(f"not executed, and not needed: {', '.join(reader.stand_ins)}")
    if reader.prefix:
        notes.append(f"every name begins with '{reader.prefix}', which is removed")
    return notes
