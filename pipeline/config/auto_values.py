"""Values written as ``auto`` because they depend on the images: chosen by looking at the source, each with its reason.

stages.<training>.image_size, .epochs, .global_batch, and data.<name>.validation_fraction
"""

from __future__ import annotations

from dataclasses import dataclass

from pydantic import ValidationError

from pipeline.config.job_queries import TRAINING
from pipeline.config.machine import device, world_size
from pipeline.config.schema import ClusterConfig
from pipeline.config.yaml_tree.reading import Node
from pipeline.errors import ConfigError
from pipeline.sources.inspection import SourceSummary, inspect_source

AUTO = "auto"
KEYS = ("image_size", "epochs", "global_batch")


@dataclass(frozen=True)
class Budget:
    """What a machine can be asked to do in a run of a few minutes (cpu) or hours (cuda)."""

    image_size: int  # largest (pixels)
    presentations: int  # images shown in pretraining, over all epochs
    epochs: tuple[int, int]
    batch: int  # largest global batch


BUDGETS = {
    "cpu": Budget(96, 30_000, (4, 60), 128),
    "cuda": Budget(224, 20_000_000, (20, 300), 1024),
}
SMALL_BATCH = 16  # below it a step is mostly overhead
UNSEEN = {
    "image_size": 64,
    "epochs": 1,
    "global_batch": 16,
}  # where the images are not looked at (rehearsals)


def choose(tree: Node, *, look: bool) -> tuple[Node, list[str]]:
    """Replace every 'auto' by a chosen value; returns the tree and what to say about it.

    Raises ConfigError where the source cannot be looked at.
    """
    notes: list[str] = []
    wanted = [
        (stage, key)
        for stage in TRAINING
        for key in KEYS
        if (node := tree.get("stages", stage, key)) is not None and node.value == AUTO
    ]
    fractions = [
        name
        for name, node in _datasets(tree).items()
        if (fraction := node.get("validation_fraction")) is not None and fraction.value == AUTO
    ]
    if not look:
        for stage, key in wanted:
            tree = tree.replaced(("stages", stage, key), Node(UNSEEN[key], "rehearse"))
        for name in fractions:
            tree = tree.replaced(("data", name, "validation_fraction"), Node(0.1, "rehearse"))
        return tree, notes
    names = dict.fromkeys([*fractions, *(_dataset_of(tree, stage) for stage, _ in wanted)])
    sources = {name: _look(tree, name) for name in names}
    for name, source in sources.items():
        notes.append(f"data.{name}: {source.summary}")
    for name in fractions:
        value, reason = _fraction(sources[name])
        tree = _chosen(tree, ("data", name, "validation_fraction"), value, reason, notes)
    for stage, key in wanted:
        name = _dataset_of(tree, stage)
        try:
            value, reason = _advice(
                tree, stage, key, sources[name], _training_images(tree, name, sources[name])
            )
        except ConfigError as error:
            place = (tree.get("stages", stage, key) or tree).origin
            raise ConfigError(
                f"stages.{stage}.{key}: {error.cause}", place=place, remedy=error.remedy
            ) from None
        tree = _chosen(tree, ("stages", stage, key), value, reason, notes)
    return tree, notes


def _chosen(
    tree: Node, path: tuple[str, ...], value: int | float, reason: str, notes: list[str]
) -> Node:
    notes.append(f"{'.'.join(path)} = {value}: {reason}")
    return tree.replaced(path, Node(value, f"chosen: {reason}"))


def _datasets(tree: Node) -> dict[str, Node]:
    data = tree.get("data")
    return data.entries() if data is not None else {}


def _dataset_of(tree: Node, stage: str) -> str:
    named = tree.get("stages", stage, "data")
    names = list(_datasets(tree))
    if named is not None and isinstance(named.value, str) and named.value in names:
        return named.value
    if len(names) == 1:
        return names[0]
    section = tree.get("stages", stage) or tree
    remedy = f"data: one of {', '.join(names)}" if names else "name a dataset in `data`"
    raise ConfigError(
        f"stages.{stage}.data: 'auto' needs to know the dataset",
        place=section.origin,
        remedy=remedy,
    )


def _look(tree: Node, name: str) -> SourceSummary:
    dataset = _datasets(tree)[name]
    root, layout = dataset.get("root"), dataset.get("layout")
    if root is None or not isinstance(root.value, str) or not root.value:
        place = root.origin if root is not None else dataset.origin
        short = "data.root" if len(_datasets(tree)) == 1 else f"data.{name}.root"
        raise ConfigError(
            f"data.{name}.root: no folder of images is given",
            place=place,
            remedy=f"--set {short}=DIR",
        )
    return inspect_source(
        root.value,
        str(layout.value) if layout is not None else AUTO,
        f"data.{name}.root",
        root.origin,
    )


def _fraction(source: SourceSummary) -> tuple[float, str]:
    if source.has_validation:
        return 0.1, "not used: the source has a validation split of its own"
    if source.images < 50 * source.classes:
        return (
            0.2,
            f"{source.images // source.classes} images a class: more held out, for a figure that means something",
        )
    return 0.1, "held out by content hash: the source has no validation split"


def _training_images(tree: Node, name: str, source: SourceSummary) -> int:
    node = tree.get("data", name, "validation_fraction")
    held_out = (
        float(node.value) if node is not None and isinstance(node.value, (int, float)) else 0.1
    )
    return source.images if source.has_validation else max(1, round(source.images * (1 - held_out)))


def _cluster(tree: Node) -> ClusterConfig:
    """The part of the cluster that tells the device and the processes; what is wrong with it is told by the schema later."""
    written = {
        key: node.data()
        for key in ("device", "processes")
        if (node := tree.get("cluster", key)) is not None
    }
    try:
        return ClusterConfig.model_validate(written, strict=True)
    except ValidationError:
        return ClusterConfig()


def _advice(
    tree: Node, stage: str, key: str, source: SourceSummary, images: int
) -> tuple[int, str]:
    cluster = _cluster(tree)
    budget = BUDGETS[device(cluster)]
    if key == "image_size":
        return _image_size(source, budget, device(cluster), later=stage == "finetune")
    if key == "epochs":
        low, high = budget.epochs
        share = 1 if stage == "pretrain" else 3
        epochs = min(high, max(low, budget.presentations // images)) // share or 1
        return (
            epochs,
            f"{images} training images, about {epochs * images} shown on {device(cluster)}",
        )
    return _global_batch(images, budget, world_size(cluster))


def _image_size(source: SourceSummary, budget: Budget, where: str, later: bool) -> tuple[int, str]:
    """The largest multiple of 32 that most images fill, within what the machine can do; fine-tuning goes one step up."""
    size = min(budget.image_size, max(64, source.short_side // 32 * 32))
    if later and source.short_side >= size + 32 and where == "cuda":
        size += 32
    return (
        size,
        f"median short side {source.short_side} pixels, between 64 and {budget.image_size} on {where}",
    )


def _global_batch(images: int, budget: Budget, processes: int) -> tuple[int, str]:
    """Even shares to all processes, doubled while an epoch keeps 20 steps (4 below SMALL_BATCH images)."""
    batch = 2 * processes
    while 2 * batch <= budget.batch and images // (2 * batch) >= (4 if batch < SMALL_BATCH else 20):
        batch *= 2
    if batch > images:
        cause = f"{images} training images are too few for {processes} processes"
        raise ConfigError(cause, remedy="more images, or --set cluster.processes=1")
    return batch, f"{images // batch} steps an epoch on {processes} processes"
