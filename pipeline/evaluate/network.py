"""A trained network and its preprocessing, from the weights that a stage left or a file holds."""

from __future__ import annotations

import torch

from pipeline.checkpoint.weights import describe, initial_weights, require_shapes, weights_path
from pipeline.config import job_queries
from pipeline.config.schema import Job, TrainConfig
from pipeline.data.dataset import PreparedDataset
from pipeline.errors import CheckpointError
from pipeline.layout import RunDir
from pipeline.model import Network, NetworkSpec


def load_network(job: Job, run_dir: RunDir, initial: str, data: PreparedDataset) -> Network:
    """The plain fp32 network (stored activations) in evaluation mode, with the weights of ``initial`` (stage or file).

    Raises:
        CheckpointError: weights missing, of another model, or trained on other classes than those of ``data``.
    """
    path, model = weights_path(run_dir, initial), job.model
    reader = initial_weights(run_dir, initial)
    trained_on = describe(path).get("classes", data.classes)
    if trained_on != data.classes:
        raise CheckpointError(
            f"weights were trained on {len(trained_on)} classes that are not the {len(data.classes)} of {data.path.name}",
            place=str(path),
            remedy="take the dataset that they were trained on",
        )
    spec = NetworkSpec(
        model.channels,
        model.depths,
        model.columns,
        len(data.classes),
        model.huge,
        block=model.block,
        activations="stored",
        supervised="classifiers.1.linear.weight" in reader.shapes,
    )
    with torch.device("meta"):
        network = Network(spec)
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
    """(image_size, resize) of the evaluation transform for the weights of ``initial``: as the job has it for that stage, else
    as they were trained. ``image_size`` goes before both. Raises CheckpointError where nothing tells the size."""
    if initial in job_queries.TRAINING and initial in job_queries.stage_names(job):
        config = job_queries.train_config(job, initial)
        return image_size or config.image_size, config.eval_resize
    path = weights_path(run_dir, initial)
    description = describe(path)
    size = image_size or description.get("image_size")
    if size is None:
        raise CheckpointError(
            "nothing tells the image size that these weights were trained with",
            place=str(path),
            remedy="put the weights.json beside them that the training stage wrote",
        )
    return size, description.get("resize", TrainConfig.model_fields["eval_resize"].default)
