"""A model from weights alone: a published file, or a folder for timm and transformers."""

from __future__ import annotations

from typing import cast

from pipeline.checkpoint.description import WeightsDescription
from pipeline.checkpoint.weights_reader import WeightsReader
from pipeline.checkpoint.weights_source import weights_source
from pipeline.data.preprocessing import Mode, Preprocessing
from pipeline.errors import CheckpointError
from pipeline.export.reload import (
    Exported,
    ModelDescription,
    describe_preprocessing,
    make_network,
)
from pipeline.sources.class_lists import class_names


def load_weights(initial: str) -> Exported:
    """The model that a weights file describes by itself.

    Classes that are not known are called by their number.

    Raises:
        CheckpointError: the file cannot be read, or does not show which network it is of.
    """
    source = weights_source(initial)
    reader = WeightsReader(*source)
    description = WeightsDescription.read(*source)
    if not description.network or description.image_size is None:
        raise CheckpointError(
            "the weights do not show their network and image size",
            place=str(source),
            remedy="export them: the stage 'export' of the job that trained them writes both",
        )
    mode = cast(Mode, description.preprocessing or Preprocessing.mode)
    prepared = Preprocessing(description.image_size, mode)
    # Without a class list, a number is better than a wrong name.
    outputs = int(str(description.network["num_classes"]))
    classes = description.classes or [str(output) for output in range(outputs)]
    names = class_names()
    model: ModelDescription = {
        "network": description.network,
        "preprocessing": describe_preprocessing(prepared),
        "classes": classes,
        "class_names": [names.get(name, name) for name in classes],
        "trained": {},
        "pipeline": "",
    }
    network = make_network(model)
    state = {name: reader.full(name) for name in reader.shapes}
    # Not strict, because the error below names what is wrong in words.
    missing, unexpected = network.load_state_dict(state, strict=False)
    # Counters of BatchNorm are integers and not among the weights.
    missing = [name for name in missing if not name.endswith("num_batches_tracked")]
    if missing or unexpected:
        raise CheckpointError(
            f"{len(missing)} parameters are missing {missing[:3]}, {len(unexpected)} are left over "
            f"{unexpected[:3]}",
            place=str(source),
            remedy="download or copy the file again",
        )
    return Exported(network.eval(), model)
