"""A job that starts from a trained model takes the network's description from it.

``from`` may name an exported model, a run, or a .safetensors file. Such a job needs no ``model``
and no image size: the description beside the weights has them.
"""

from __future__ import annotations

import os
from pathlib import Path

from pipeline.checkpoint.description import WeightsDescription
from pipeline.config.job_queries import ORDER, TRAINING
from pipeline.config.schema import ModelConfig
from pipeline.config.yaml_tree.reading import Node
from pipeline.errors import CheckpointError, ConfigError
from pipeline.layout import MODEL_JSON, MODEL_WEIGHTS, WEIGHTS_JSON, RunDir

SUFFIX = ".safetensors"
# Keys of the model that decide how training computes, which a trained network has behind it.
_TRAINING_ONLY = {"activations", "stored_columns", "drop_path", "compile", "fraction_bits"}


def weights_file(source: str) -> str:
    """The weights file of ``from``: of an exported model, a run or a file; else ``source`` itself.

    Example: "runs/flowers" -> "/home/.../runs/flowers/export/model.safetensors".
    """
    path = Path(os.path.abspath(os.path.expanduser(source)))
    if source.endswith(SUFFIX):
        return str(path)
    if source in ORDER or not path.is_dir():
        return source
    run = RunDir(path)
    candidates = [path / MODEL_WEIGHTS, run.export / MODEL_WEIGHTS]
    candidates += [run.weights(stage) for stage in reversed(TRAINING)]
    return next((str(file) for file in candidates if file.is_file()), source)


def describe_network(tree: Node) -> Node:
    """Add the model, and the image size of the evaluation, of the weights that a job starts from.

    Values that the job has itself stay.

    Raises:
        ConfigError: the job has neither a model nor weights that describe one.
    """
    stages = tree.get("stages")
    written = stages.entries() if stages is not None else {}
    for stage in [stage for stage in ORDER if stage in written]:
        node = tree.get("stages", stage, "from")
        if node is None or not isinstance(node.value, str):
            continue
        if not node.value.endswith(SUFFIX) or not Path(node.value).is_file():
            if tree.get("model") is None and not set(TRAINING) & set(written):
                raise _no_trained_model(stage, node)
            continue
        tree = _with_values_of(tree, stage, Path(node.value))
    return tree


def _with_values_of(tree: Node, stage: str, weights: Path) -> Node:
    try:
        description = WeightsDescription.read(weights)
    except CheckpointError as error:
        raise ConfigError(error.cause, place=error.place, remedy=error.remedy) from None
    is_export = weights.name == MODEL_WEIGHTS
    origin = str(weights.with_name(MODEL_JSON if is_export else WEIGHTS_JSON))
    if tree.get("model") is None and description.network:
        keys = ModelConfig.model_fields.keys() - _TRAINING_ONLY
        network = {key: value for key, value in description.network.items() if key in keys}
        tree = tree.replaced(("model",), Node.of(network, origin))
    size = ("stages", stage, "image_size")
    if stage == "evaluate" and tree.get(*size) is None and description.image_size is not None:
        tree = tree.replaced(size, Node(description.image_size, origin))
    return tree


def _no_trained_model(stage: str, node: Node) -> ConfigError:
    key = f"stages.{stage}.from"
    cause = (
        f"there is no trained model in {node.value}" if node.value else "no trained model is given"
    )
    return ConfigError(
        f"{key}: {cause}",
        place=node.origin,
        remedy=f"--set {key}=DIR, the folder of an exported model or of a run",
    )
