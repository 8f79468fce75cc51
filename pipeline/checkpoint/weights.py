"""Weights of a training stage: where they lie, what describes them, and whether they fit a network."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pipeline.checkpoint.reader import RangeReader, WeightsReader
from pipeline.errors import CheckpointError
from pipeline.layout import WEIGHTS_JSON, RunDir

Shapes = dict[str, tuple[int, ...]]


def weights_path(run_dir: RunDir, initial: str) -> Path:
    """Where the weights of the stage (or file) lie that a stage takes `from`. Raises CheckpointError if they do not."""
    path = Path(initial) if initial.endswith(".safetensors") else run_dir.weights(initial)
    if not path.is_file():
        raise CheckpointError(
            "weights file is missing",
            place=str(path),
            remedy=f"run the stage {initial!r} first, or name a .safetensors file",
        )
    return path


def describe(path: Path) -> dict[str, Any]:
    """What a training stage wrote down beside its weights (`write_weights`); empty for weights from elsewhere."""
    try:
        description: dict[str, Any] = json.loads(path.with_name(WEIGHTS_JSON).read_text())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"cannot be read ({error})", place=str(path.with_name(WEIGHTS_JSON))
        ) from error
    return description


def initial_weights(run_dir: RunDir, initial: str) -> WeightsReader:
    """Weights of the stage (or file) that a stage starts `from`."""
    return WeightsReader(weights_path(run_dir, initial))


def is_head(name: str) -> bool:
    """Parameters that belong to one stage: classifiers and decoders (their numbers count positions, which differ)."""
    return name.startswith(("classifiers.", "decoders."))


def loadable(source: RangeReader, shapes: Shapes, place: str) -> list[str]:
    """Names of the backbone's parameters; all of them must be in the source, in the same shape. Raises CheckpointError."""
    names = [name for name in shapes if not is_head(name)]
    require_shapes(source, {name: shapes[name] for name in names}, place)
    return names


def require_shapes(source: RangeReader, shapes: Shapes, place: str) -> None:
    """Raise CheckpointError, naming the first parameter that the source lacks or has in another shape."""
    for name, shape in shapes.items():
        found = source.shapes.get(name)
        if found is None or tuple(found) != shape:
            raise CheckpointError(
                f"parameter {name} of the model has shape {list(shape)}, the weights have {found or 'none such'}",
                place=place,
                remedy="take the model (channels, depths, columns, huge) and the classes that the weights were trained with",
            )
