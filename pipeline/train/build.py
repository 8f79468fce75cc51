"""From a job to a network's shape and its initial weights."""

from __future__ import annotations

from pathlib import Path

from pipeline.checkpoint.reader import RangeReader, WeightsReader
from pipeline.config.schema import Job, TrainConfig
from pipeline.errors import CheckpointError
from pipeline.model import Activations, NetworkSpec


def network_spec(job: Job, config: TrainConfig, num_classes: int, activations: Activations | None = None) -> NetworkSpec:
    """The network of a training stage; ``activations`` overrides the model's (evaluation and export use 'stored')."""
    model = job.model
    return NetworkSpec(
        channels=model.channels,
        depths=model.depths,
        columns=model.columns,
        num_classes=num_classes,
        huge=model.huge,
        supervised=config.supervision,
        block=model.block,
        activations=activations or model.activations,
        drop_path=model.drop_path if config.drop_path is None else config.drop_path,
        head_init_scale=config.head_init_scale,
    )


def initial_weights(run_dir: Path, initial: str) -> WeightsReader:
    """Weights of the stage (or file) that a stage starts `from`."""
    path = Path(initial) if initial.endswith(".safetensors") else run_dir / "stages" / initial / "weights.safetensors"
    if not path.is_file():
        raise CheckpointError(
            "weights file is missing", place=str(path), remedy=f"run the stage {initial!r} first, or name a .safetensors file"
        )
    return WeightsReader(path)


def is_head(name: str) -> bool:
    """Parameters that may differ between the stages: classifiers and decoders."""
    return name.startswith(("classifiers.", "decoders."))


def loadable(source: RangeReader, shapes: dict[str, tuple[int, ...]], place: str) -> tuple[list[str], list[str]]:
    """(names to load, head parameters that stay as initialised). All of the backbone must be there in the same shape."""
    load, fresh = [], []
    for name, shape in shapes.items():
        if list(source.shapes.get(name, ())) == list(shape) and not is_head(name):
            load.append(name)
        elif is_head(name):
            fresh.append(name)
        else:
            found = source.shapes.get(name)
            raise CheckpointError(
                f"parameter {name} of the model has shape {list(shape)}, the weights have {found if found else 'none such'}",
                place=place,
                remedy="fine-tune with the same model (channels, depths, columns, huge) as the weights were trained with",
            )
    return load, fresh
