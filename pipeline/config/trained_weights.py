"""A job that starts from a trained model takes the network's description from it.

``from`` may name an exported model, a run, or a weights file, ours or a published one. Such a job
needs no ``model``, no image size and no preprocessing: the weights, or the description beside them,
have them.
"""

from __future__ import annotations

import os
from pathlib import Path

from pipeline.checkpoint.description import WeightsDescription
from pipeline.checkpoint.weights_source import TORCH_SUFFIXES, is_weights_file, weights_source
from pipeline.config.job_queries import ORDER, TRAINING
from pipeline.config.schema import ModelConfig
from pipeline.config.yaml_tree.reading import Node
from pipeline.config.yaml_tree.references import merge
from pipeline.errors import CheckpointError, ConfigError
from pipeline.layout import HUB, MODEL_WEIGHTS, SHARDED_WEIGHTS, RunDir

# Keys of the model that decide how training computes, which a trained network has behind it.
_TRAINING_ONLY = {"activations", "stored_columns", "drop_path", "compile", "fraction_bits"}
NETWORK_KEYS = tuple(key for key in ModelConfig.model_fields if key not in _TRAINING_ONLY)


def weights_file(source: str) -> str:
    """The weights file of ``from``: of an exported model, a run or a file; else ``source`` itself.

    Example: "runs/flowers" -> "/home/.../runs/flowers/export/model.safetensors".
    """
    path = Path(os.path.abspath(os.path.expanduser(source)))
    if is_weights_file(source):
        return str(path)
    if source in ORDER or not path.is_dir():
        return source
    run = RunDir(path)
    folders = [path, run.export, path / HUB]
    candidates = [folder / name for folder in folders for name in (MODEL_WEIGHTS, SHARDED_WEIGHTS)]
    candidates += [run.weights(stage) for stage in reversed(TRAINING)]
    return next((str(file) for file in candidates if file.is_file()), source)


def describe_network(tree: Node) -> tuple[Node, list[str]]:
    """Add the model, and image size and preprocessing of the evaluation, of a job's weights.

    Values that the job has itself stay.

    Returns:
        the tree, and notes on how the weights were read.

    Raises:
        ConfigError: the job has neither a model nor weights that describe one.
    """
    notes: list[str] = []
    stages = tree.get("stages")
    written = stages.entries() if stages is not None else {}
    for stage in [stage for stage in ORDER if stage in written]:
        node = tree.get("stages", stage, "from")
        if node is None or not isinstance(node.value, str):
            continue
        is_there = is_weights_file(node.value) and weights_source(node.value).path.is_file()
        if not is_there:
            outside = bool(node.value) and node.value not in ORDER
            if tree.get("model") is None and (outside or not set(TRAINING) & set(written)):
                raise _no_trained_model(stage, node)
            continue
        tree = _with_values_of(tree, stage, node.value, notes)
        if not _has_model(tree):
            raise ConfigError(
                f"stages.{stage}.from: the weights do not show which network they are of",
                place=node.origin,
                remedy="write the `model` that they were trained with into the job",
            )
    return tree, notes


def _has_model(tree: Node) -> bool:
    return tree.get("model", "channels") is not None


def _with_values_of(tree: Node, stage: str, initial: str, notes: list[str]) -> Node:
    source = weights_source(initial)
    try:
        description = WeightsDescription.read(*source)
        if source.path.suffix in TORCH_SUFFIXES:
            from pipeline.checkpoint.undescribed import reading_notes  # imports torch

            notes += [f"stages.{stage}.from: {note}" for note in reading_notes(*source)]
    except CheckpointError as error:
        raise ConfigError(error.cause, place=error.place, remedy=error.remedy) from None
    origin = description.place or initial
    if not _has_model(tree) and description.network:
        network = {
            key: description.network[key] for key in NETWORK_KEYS if key in description.network
        }
        written = tree.get("model") or Node({}, origin)
        tree = tree.replaced(("model",), merge(Node.of(network, origin), written))
    if stage == "evaluate":
        known = {
            "image_size": description.image_size,
            "preprocessing": description.preprocessing,
        }
        for key, value in known.items():
            path = ("stages", stage, key)
            if tree.get(*path) is None and value is not None:
                tree = tree.replaced(path, Node(value, origin))
    return tree


def _no_trained_model(stage: str, node: Node) -> ConfigError:
    key = f"stages.{stage}.from"
    cause = (
        f"there is no trained model in {node.value}" if node.value else "no trained model is given"
    )
    return ConfigError(
        f"{key}: {cause}",
        place=node.origin,
        remedy=f"--set {key}=DIR, the folder of an exported model or of a run, or a weights file",
    )
