"""From a job to a network's shape and its initial weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pipeline.checkpoint.reader import RangeReader, WeightsReader
from pipeline.config.schema import Job, TrainConfig
from pipeline.errors import CheckpointError
from pipeline.model import NetworkSpec

Shapes = dict[str, tuple[int, ...]]


def network_spec(job: Job, config: TrainConfig, num_classes: int) -> NetworkSpec:
    """The network of a training stage."""
    model = job.model
    return NetworkSpec(
        channels=model.channels,
        depths=model.depths,
        columns=model.columns,
        num_classes=num_classes,
        huge=model.huge,
        supervised=config.supervision,
        block=model.block,
        activations=model.activations,
        drop_path=model.drop_path if config.drop_path is None else config.drop_path,
        head_init_scale=config.head_init_scale,
        stored_columns=model.stored_columns,
        compile=model.compile,
        fraction_bits=model.fraction_bits,
    )


def weights_path(run_dir: Path, initial: str) -> Path:
    """Where the weights of the stage (or file) lie that a stage takes `from`. Raises CheckpointError if they do not."""
    path = Path(initial) if initial.endswith(".safetensors") else run_dir / "stages" / initial / "weights.safetensors"
    if not path.is_file():
        raise CheckpointError(
            "weights file is missing", place=str(path), remedy=f"run the stage {initial!r} first, or name a .safetensors file"
        )
    return path


def describe(path: Path) -> dict[str, Any]:
    """What a training stage wrote down beside its weights (`write_weights`); empty for weights from elsewhere."""
    try:
        description: dict[str, Any] = json.loads(path.with_name("weights.json").read_text())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot be read ({error})", place=str(path.with_name("weights.json"))) from error
    return description


def initial_weights(run_dir: Path, initial: str) -> WeightsReader:
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
