"""What a weights file holds, in words: the work behind the command weights."""

from __future__ import annotations

import math
from collections.abc import Iterator

from pipeline.checkpoint.architecture import architecture_of
from pipeline.checkpoint.description import WeightsDescription
from pipeline.checkpoint.undescribed import published_classes
from pipeline.checkpoint.weights_reader import WeightsReader
from pipeline.checkpoint.weights_source import is_weights_file, weights_source
from pipeline.config.shipped_models import model_named
from pipeline.config.trained_weights import weights_file
from pipeline.errors import CheckpointError, DataError

MIB = 1 << 20


def weights_summary(target: str) -> Iterator[tuple[str, str]]:
    """Lines of label and text.

    Args:
        target: a weights file, or the folder of an exported model or of a run.

    Raises:
        DataError: there is no such file.
        CheckpointError: it holds no weights of such a network.
    """
    file = weights_file(target)
    source = weights_source(file)
    if not is_weights_file(file) or not source.path.is_file():
        raise DataError("is no weights file", place=target, remedy="name a file or a folder")
    reader = WeightsReader(*source)
    description = WeightsDescription.read(*source)
    architecture = architecture_of(reader.shapes)
    if architecture is None:
        raise CheckpointError(
            "holds weights of another network: reversible columns have parameters such as "
            "subnet0.alpha0 or columns.0.levels.0.alpha",
            place=str(source),
            remedy="name weights of a reversible column network",
        )
    # A description knows more than names and shapes, such as the kind of blocks.
    network = {**architecture, **description.network}
    parameters = sum(math.prod(shape) for shape in reader.shapes.values())
    yield "file", f"{source.path}, {source.path.stat().st_size / MIB:,.1f} MiB"
    yield "weights", f"{parameters / 1e6:,.2f} M parameters{_entry(reader)}"
    yield "model", _model(network)
    # RevCol-H differs in its wiring, which its widths do not show.
    columns = "columns with the wiring of RevCol-H" if network["huge"] else "columns"
    yield "network", f"{network['columns']} {columns}, channels {network['channels']}"
    yield "", f"depths {network['depths']}, {network.get('block', 'unknown')} blocks"
    yield "head", _head(reader)
    yield "classes", _classes(architecture["num_classes"], description, reader)
    if description.image_size is not None:
        # A size that nobody states is a guess, and shown as such.
        stated = reader.image_size is not None or description.place
        assumed = "" if stated else " (not in the file: assumed)"
        yield "image size", f"{description.image_size} pixels{assumed}"
    if reader.prefix:
        yield "names", f"begin with '{reader.prefix}', which is removed"
    if reader.stand_ins:
        yield "not executed", ", ".join(reader.stand_ins)


def _entry(reader: WeightsReader) -> str:
    # As they are written in `from`: FILE.pth#model.
    others = [f"#{name}" for name in reader.entries if name and name != reader.entry]
    text = f" in '{reader.entry}'" if reader.entry else ""
    return f"{text}; also there: {', '.join(others)}" if others else text


def _model(network: dict[str, object]) -> str:
    name = model_named(network) if "block" in network else ""
    return f"{name} (configs/model/{name}.yaml)" if name else "none of configs/model"


def _head(reader: WeightsReader) -> str:
    # Decoders show supervision too: a file may have lost its classifiers.
    heads = {name.split(".")[1] for name in reader.shapes if name.startswith("classifiers.")}
    decoders = {name.split(".")[1] for name in reader.shapes if name.startswith("decoders.")}
    if len(heads) <= 1:
        return "one classifier" if heads else "none"
    return f"intermediate supervision: {len(heads)} classifiers, {len(decoders)} decoders"


def _classes(outputs: int, description: WeightsDescription, reader: WeightsReader) -> str:
    if reader.published and (listed := published_classes(outputs)):
        return f"{outputs:,}, in the order of configs/classes/{listed}.txt"
    known = description.classes
    if not known:
        return f"{outputs:,}, whose names are not known"
    return f"{outputs:,}: {', '.join(known[:5])}{', ...' if outputs > 5 else ''}"
