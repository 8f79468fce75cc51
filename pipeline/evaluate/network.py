"""A trained network and its preprocessing, from the weights of a stage or of a file."""

from __future__ import annotations

from typing import cast

import numpy as np
import torch

from pipeline.checkpoint.architecture import CLASSIFIER, last_classifier
from pipeline.checkpoint.description import WeightsDescription
from pipeline.checkpoint.weights import initial_weights, require_shapes, weights_of
from pipeline.config import job_queries
from pipeline.config.schema import Job, ModelConfig
from pipeline.data.dataset import PreparedDataset, Split
from pipeline.data.preprocessing import Mode, Preprocessing
from pipeline.errors import CheckpointError, DataError
from pipeline.layout import RunDir
from pipeline.model import Network, NetworkSpec

SHOWN_CLASSES = 10  # names in an error message


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


def require_same_classes(run_dir: RunDir, initial: str, data: PreparedDataset) -> None:
    """Raise CheckpointError if the weights' classes differ from the dataset's in number or order.

    For an export, whose class list is that of the dataset.
    """
    source = weights_of(run_dir, initial)
    trained = WeightsDescription.read(*source).classes
    if trained is not None and trained != data.classes:
        raise CheckpointError(
            f"weights were trained on {len(trained)} classes that are not the "
            f"{len(data.classes)} of {data.path.name}",
            place=str(source),
            remedy="take the dataset that the weights were trained on, or fine-tune on this one",
        )


def labelled_for(model_classes: list[str] | None, data: PreparedDataset, split_name: str) -> Split:
    """A split whose labels are the outputs of a model, matched by the names of the classes.

    The last layer knows indices only. Example: a model of the classes [ape, bee, cat] and a folder
    of [cat, ape], in which images of cat have label 0:

        label in the folder   0 (cat)   1 (ape)
        output of the model   2         0

    Classes of the model without images do not matter.

    Args:
        model_classes: in the order of the model's outputs; None if nothing is known: then the
            dataset's order is taken for the model's.

    Raises:
        DataError: the split has images of a class that the model does not know.
    """
    split = data.split(split_name)
    if model_classes is None or model_classes == data.classes:
        return split
    output_of = {name: output for output, name in enumerate(model_classes)}
    outputs = np.array([output_of.get(name, -1) for name in data.classes], dtype=np.int64)
    images = np.bincount(split.labels, minlength=len(data.classes))
    unknown = [
        name
        for name, count, output in zip(data.classes, images, outputs, strict=True)
        if count and output < 0
    ]
    if unknown:
        shown = ", ".join(unknown[:SHOWN_CLASSES])
        known = ", ".join(model_classes[:SHOWN_CLASSES])
        raise DataError(
            f"{len(unknown)} classes are unknown to the model: {shown}",
            place=str(data.path),
            remedy="rename or remove them, or fine-tune the weights on these classes; the model "
            f"knows {len(model_classes)} classes: {known}",
        )
    return split.relabelled(outputs)


def load_network(job: Job, run_dir: RunDir, initial: str, data: PreparedDataset) -> Network:
    """Build the fp32 network in evaluation mode and load the weights of ``initial``.

    Args:
        initial: a training stage, or a weights file.
        data: gives the number of classes of weights without a description.

    Raises:
        CheckpointError: the weights are missing or belong to another model.
    """
    # 1. The weights and their classes.
    source = weights_of(run_dir, initial)
    reader = initial_weights(run_dir, initial)
    classes = WeightsDescription.read(*source).classes or data.classes
    head = last_classifier(reader.shapes)
    # A head of other classes would be evaluated without an error: logits are only numbers.
    outputs = reader.shapes.get(f"{head}linear.weight", [0])[0]
    if outputs != len(classes):
        raise CheckpointError(
            f"the classifier has {outputs} outputs, {data.path.name} has {len(classes)} classes",
            place=str(source),
            remedy="take images of the classes that the weights were trained on, or fine-tune them",
        )
    # 2. An empty network: on the meta device no weights are initialised. The file shows which
    #    heads it has.
    spec = architecture_spec(job.model, len(classes), supervised=head != CLASSIFIER)
    with torch.device("meta"):
        network = Network(spec)
    # 3. The weights become the network's parameters. Integer buffers are not in the file. Copies:
    #    in a mapped file, weights begin anywhere. Libraries sum in another order where memory is
    #    not aligned, so that the last bit of a result would depend on the length of a header.
    shapes = {
        name: tuple(value.shape)
        for name, value in network.state_dict().items()
        if value.is_floating_point()
    }
    require_shapes(reader, shapes, str(source))
    weights = {name: reader.full(name).clone() for name in shapes}
    network.load_state_dict(weights, strict=True, assign=True)
    return network.eval()


def preprocessing(
    job: Job,
    run_dir: RunDir,
    initial: str,
    *,
    image_size: int | None = None,
    mode: Mode | None = None,
) -> Preprocessing:
    """How images are prepared for the weights of ``initial``.

    The first that says it: the arguments; the stage ``initial`` of the job; what describes the
    weights.

    Raises:
        CheckpointError: none of them gives an image size.
    """
    if initial in job_queries.TRAINING and initial in job_queries.stage_names(job):
        config = job_queries.train_config(job, initial)
        return Preprocessing(image_size or config.image_size, mode or config.preprocessing)
    source = weights_of(run_dir, initial)
    description = WeightsDescription.read(*source)
    size = image_size or description.image_size
    if size is None:
        raise CheckpointError(
            "the image size that these weights were trained with is unknown",
            place=str(source),
            remedy="set image_size, or copy the weights.json of the training stage beside them",
        )
    described = cast(Mode, description.preprocessing or Preprocessing.mode)
    return Preprocessing(size, mode or described)
