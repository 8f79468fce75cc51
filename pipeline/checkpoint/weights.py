"""Weights of a training stage: their file, and the check against a network."""

from __future__ import annotations

from pipeline.checkpoint.description import SAFETENSORS
from pipeline.checkpoint.reader import RangeReader
from pipeline.checkpoint.weights_file import verify_weights_file
from pipeline.checkpoint.weights_reader import WeightsReader
from pipeline.checkpoint.weights_source import WeightsSource, source_in_run
from pipeline.errors import CheckpointError
from pipeline.layout import RunDir

Shapes = dict[str, tuple[int, ...]]


def weights_of(run_dir: RunDir, initial: str) -> WeightsSource:
    """The weights file of ``initial``: a stage of this run, or the file that it names.

    Raises:
        CheckpointError: the file does not exist.
    """
    source = source_in_run(run_dir, initial)
    if not source.path.is_file():
        raise CheckpointError(
            "weights file is missing",
            place=str(source.path),
            remedy=f"run the stage {initial!r} first, or name a weights file",
        )
    return source


def initial_weights(run_dir: RunDir, initial: str) -> WeightsReader:
    """Open the weights that a stage starts `from`, after a comparison with their digest.

    Raises:
        CheckpointError: the file does not exist, is damaged or cannot be read.
    """
    source = weights_of(run_dir, initial)
    if source.path.suffix == SAFETENSORS:
        verify_weights_file(source.path)
    return WeightsReader(*source)


def is_head(name: str) -> bool:
    """True for a parameter of a classifier or decoder.

    Heads belong to one stage: their numbers count supervised positions, which differ by stage.
    """
    return name.startswith(("classifiers.", "decoders."))


def backbone_names(source: RangeReader, shapes: Shapes, place: str) -> list[str]:
    """Names of the backbone's parameters in ``shapes``, all of which ``source`` can provide.

    Raises:
        CheckpointError: ``source`` lacks one of them, or has it in another shape.
    """
    names = [name for name in shapes if not is_head(name)]
    require_shapes(source, {name: shapes[name] for name in names}, place)
    return names


def require_shapes(source: RangeReader, shapes: Shapes, place: str) -> None:
    """Check that ``source`` holds every parameter in its shape.

    Raises:
        CheckpointError: names the first parameter that is missing or has another shape.
    """
    for name, shape in shapes.items():
        stored = source.shapes.get(name)
        if stored is None or tuple(stored) != shape:
            weights = "no such parameter" if stored is None else f"shape {list(stored)}"
            raise CheckpointError(
                f"parameter {name} of the model has shape {list(shape)}, "
                f"the weights have {weights}",
                place=place,
                remedy="use the model (channels, depths, columns, huge) and the classes that "
                "the weights were trained with",
            )
