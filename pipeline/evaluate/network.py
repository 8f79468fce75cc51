"""A trained network and its preprocessing, from the weights of a stage or of a file."""

from __future__ import annotations

import torch

from pipeline.checkpoint.weights import (
    WeightsDescription,
    initial_weights,
    require_shapes,
    weights_path,
)
from pipeline.config import job_queries
from pipeline.config.schema import Job, ModelConfig, TrainConfig
from pipeline.data.dataset import PreparedDataset
from pipeline.errors import CheckpointError
from pipeline.layout import RunDir
from pipeline.model import Network, NetworkSpec


def architecture_spec(model: ModelConfig, num_classes: int, *, supervised: bool) -> NetworkSpec:
    """What decides the parameters of a network, computed plainly: stored activations, no drop path.

    Args:
        supervised: heads for intermediate supervision (four classifiers) or one classifier.
    """
    return NetworkSpec(
        channels=model.channels,
        depths=model.depths,
        columns=model.columns,
        num_classes=num_classes,
        huge=model.huge,
        supervised=supervised,
        block=model.block,
        stem_stride=model.stem_stride,
        activations="stored",
    )


def load_network(job: Job, run_dir: RunDir, initial: str, data: PreparedDataset) -> Network:
    """Build the fp32 network in evaluation mode and load the weights of ``initial``.

    Args:
        initial: a training stage, or the path of a .safetensors file.

    Raises:
        CheckpointError: the weights are missing, belong to another model, or were trained on other
            classes than those of ``data``.
    """
    # 1. The classes must match in number and order, as the last layer knows indices only.
    path = weights_path(run_dir, initial)
    reader = initial_weights(run_dir, initial)
    trained_classes = WeightsDescription.read(path).classes
    if trained_classes is not None and trained_classes != data.classes:
        raise CheckpointError(
            f"weights were trained on {len(trained_classes)} classes that are not the "
            f"{len(data.classes)} of {data.path.name}",
            place=str(path),
            remedy="take the dataset that the weights were trained on",
        )
    # 2. An empty network: on the meta device no weights are initialised. The file shows which
    #    heads it has.
    spec = architecture_spec(
        job.model,
        len(data.classes),
        supervised="classifiers.1.linear.weight" in reader.shapes,
    )
    with torch.device("meta"):
        network = Network(spec)
    # 3. The weights become the network's parameters. Integer buffers are not in the file.
    shapes = {
        name: tuple(value.shape)
        for name, value in network.state_dict().items()
        if value.is_floating_point()
    }
    require_shapes(reader, shapes, str(path))
    network.load_state_dict({name: reader.full(name) for name in shapes}, strict=True, assign=True)
    return network.eval()


def preprocessing(
    job: Job, run_dir: RunDir, initial: str, image_size: int | None = None
) -> tuple[int, float]:
    """(image_size, resize) of the evaluation transform for the weights of ``initial``.

    Image size, first match: the argument; the stage ``initial`` of the job; ``weights.json``.

    Raises:
        CheckpointError: none of them gives an image size.
    """
    if initial in job_queries.TRAINING and initial in job_queries.stage_names(job):
        config = job_queries.train_config(job, initial)
        return image_size or config.image_size, config.eval_resize
    path = weights_path(run_dir, initial)
    description = WeightsDescription.read(path)
    size = image_size or description.image_size
    if size is None:
        raise CheckpointError(
            "the image size that these weights were trained with is unknown",
            place=str(path),
            remedy="set image_size, or copy the weights.json of the training stage beside them",
        )
    if description.resize is not None:
        return size, description.resize
    default: float = TrainConfig.model_fields["eval_resize"].default
    return size, default
