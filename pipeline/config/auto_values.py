"""Chooses values left to ``auto`` from the images, and tells the user the reason for each.

Keys: ``model.stem_stride``, ``data.<name>.validation_fraction`` and those of a training stage in
``auto_rules``, which has the rules and a worked example.
"""

from __future__ import annotations

import math
import os
from typing import Any, Literal

from pydantic import ValidationError

from pipeline.config import auto_rules
from pipeline.config.auto_rules import PLACEHOLDERS, RULES, Choice, StageFacts
from pipeline.config.job_queries import TRAINING
from pipeline.config.machine import device, world_size
from pipeline.config.schema import (
    ClusterConfig,
    DatasetConfig,
    ModelConfig,
    SplitsConfig,
    TrainConfig,
)
from pipeline.config.yaml_tree.reading import Node
from pipeline.errors import ConfigError, DataError
from pipeline.sources.inspection import SourceSummary, inspect_source
from pipeline.sources.survey import unknown_splits

AUTO = "auto"
KEYS = tuple(RULES)  # of a training stage
STEM_STRIDE = ("model", "stem_stride")
FEW_PER_CLASS = 50  # images; with fewer, more are held out


def choose(tree: Node, *, placeholders: str = "") -> tuple[Node, list[str]]:
    """Replace every 'auto' in a job's tree by a chosen value.

    Args:
        placeholders: where no source is at hand, in a rehearsal and for images that only a
            cluster sees: the origin of the values that stand for the chosen ones.

    Returns:
        the tree, and notes for the user.

    Raises:
        ConfigError: a source cannot be inspected, or has too few images.
    """
    datasets = [name for name in _datasets(tree) if _is_auto(_fraction_node(tree, name))]
    stage_keys = [
        (stage, key)
        for stage in TRAINING
        for key in KEYS
        if _is_auto(tree.get("stages", stage, *key.split(".")))
    ]
    if placeholders:
        return _with_placeholders(tree, datasets, stage_keys, placeholders), []
    # 1. Inspect each source once, although several keys may need it.
    names = dict.fromkeys([*datasets, *(_dataset_of(tree, stage) for stage, _ in stage_keys)])
    sources = {name: _inspect(tree, name) for name in names}
    notes = [f"data.{name}: {source.summary}" for name, source in sources.items()]
    # 2. Held-out shares first: they decide how many training images the stages have.
    for name in datasets:
        choice = _validation_fraction(sources[name])
        tree = _with_choice(tree, ("data", name, "validation_fraction"), choice, notes)
    # 3. The stem, whose stride decides which image sizes are possible.
    if _is_auto(tree.get(*STEM_STRIDE)):
        tree = _with_choice(tree, STEM_STRIDE, auto_rules.stem_stride(_side(tree, sources)), notes)
    # 4. The stages.
    for stage, key in stage_keys:
        path = ("stages", stage, *key.split("."))
        facts = _facts(tree, stage, sources[_dataset_of(tree, stage)])
        try:
            choice = RULES[key](facts)
        except ConfigError as error:
            place = (tree.get(*path) or tree).origin
            cause = f"{'.'.join(path)}: {error.cause}"
            raise ConfigError(cause, place=place, remedy=error.remedy) from None
        tree = _with_choice(tree, path, choice, notes)
    return tree, notes


def _is_auto(node: Node | None) -> bool:
    return node is not None and node.value == AUTO


def _with_placeholders(
    tree: Node, datasets: list[str], stage_keys: list[tuple[str, str]], origin: str
) -> Node:
    for stage, key in stage_keys:
        path = ("stages", stage, *key.split("."))
        value = _shared_batch(tree) if key == "global_batch" else PLACEHOLDERS[key]
        tree = tree.replaced(path, Node.of(value, origin))
    for name in datasets:
        tree = tree.replaced(("data", name, "validation_fraction"), Node(0.1, origin))
    if _is_auto(tree.get(*STEM_STRIDE)):
        tree = tree.replaced(STEM_STRIDE, Node(auto_rules.SMALL_STEM_STRIDE, origin))
    return tree


def _shared_batch(tree: Node) -> int:
    """The placeholder of the global batch, rounded up to one that the processes can share."""
    batch = PLACEHOLDERS["global_batch"]
    assert isinstance(batch, int)
    world = world_size(_cluster(tree))
    return -(-batch // world) * world


def _with_choice(tree: Node, path: tuple[str, ...], choice: Choice, notes: list[str]) -> Node:
    notes.append(f"{'.'.join(path)} = {choice.value}: {choice.reason}")
    return tree.replaced(path, Node.of(choice.value, f"chosen: {choice.reason}"))


def _datasets(tree: Node) -> dict[str, Node]:
    data = tree.get("data")
    return data.entries() if data is not None else {}


def _fraction_node(tree: Node, name: str) -> Node | None:
    return tree.get("data", name, "validation_fraction")


def _dataset_of(tree: Node, stage: str) -> str:
    """The name of the dataset that a stage trains on."""
    node = tree.get("stages", stage, "data")
    names = list(_datasets(tree))
    if node is not None and isinstance(node.value, str) and node.value in names:
        return node.value
    if len(names) == 1:
        return names[0]
    section = tree.get("stages", stage) or tree
    cause = f"stages.{stage}.data: 'auto' needs to know the dataset"
    remedy = f"data: one of {', '.join(names)}" if names else "name a dataset in `data`"
    raise ConfigError(cause, place=section.origin, remedy=remedy)


def _inspect(tree: Node, name: str) -> SourceSummary:
    """Inspect the source of a dataset."""
    dataset = _datasets(tree)[name]
    root = dataset.get("root")
    layout = dataset.get("layout")
    if root is None or not isinstance(root.value, str) or not root.value:
        place = root.origin if root is not None else dataset.origin
        key = "data.root" if len(_datasets(tree)) == 1 else f"data.{name}.root"
        cause = f"data.{name}.root: no folder of images is given"
        raise ConfigError(cause, place=place, remedy=f"--set {key}=DIR")
    layout_name = str(layout.value) if layout is not None else AUTO
    splits = _splits(dataset.get("splits"))
    names: dict[str, Any] = {
        key: node.value
        for key in ("classes", "image_column", "label_column")
        if (node := dataset.get(key)) is not None
    }
    config = DatasetConfig.model_construct(
        root=os.path.expanduser(root.value), layout=layout_name, splits=splits, **names
    )
    is_local = "://" not in root.value and layout_name != "huggingface"
    if is_local and not os.path.isdir(config.root):
        key = f"data.{name}.root"
        cause = f"{key}: there is no folder {root.value}"
        raise ConfigError(cause, place=root.origin, remedy=f"--set {key}=DIR")
    for split, (cause, remedy) in unknown_splits(config).items():
        node = dataset.get("splits", split) or dataset
        raise ConfigError(f"data.{name}.splits.{split}: {cause}", place=node.origin, remedy=remedy)
    try:
        return inspect_source(config)
    except DataError as error:
        cause = f"data.{name}.root: {error.place or root.value}: {error.cause}"
        raise ConfigError(cause, place=root.origin, remedy=error.remedy) from None


def _splits(node: Node | None) -> SplitsConfig | Literal["none"] | None:
    """The key ``splits`` of a dataset; None also for a mistake, which the schema reports later."""
    written = node.data() if node is not None else None
    if written == "none":
        return "none"
    try:
        return SplitsConfig.model_validate(written, strict=True)
    except ValidationError:
        return None


def _validation_fraction(source: SourceSummary) -> Choice:
    if source.has_validation:
        return Choice(0.1, "not used: the source has a validation split of its own")
    # A tenth of 20 images is 2: one mistake would move the accuracy by 50 percentage points.
    if source.images < FEW_PER_CLASS * source.classes:
        per_class = source.images // source.classes
        reason = f"only {per_class} images per class: more are held out for a reliable accuracy"
        return Choice(0.2, reason)
    return Choice(0.1, "held out by content hash: the source has no validation split")


def _training_images(tree: Node, name: str, source: SourceSummary) -> int:
    """Images that remain for training. Example: 400 images, 0.1 held out -> 360."""
    if source.has_validation:
        return source.images
    node = _fraction_node(tree, name)
    held_out = node.value if node is not None else None
    fraction = float(held_out) if isinstance(held_out, (int, float)) else 0.1
    return max(1, round(source.images * (1 - fraction)))


def _fewest(source: SourceSummary, images: int) -> int:
    """Training images that remain for certain: each image is held out by chance, on its own.

    Example: of 6 images in 2 classes, 5 are expected and 2 are certain, one of each class.
    """
    held_out = source.images - images
    deviation = math.sqrt(held_out * images / max(1, source.images))
    return max(source.classes, min(images, int(images - 3 * deviation)))


def _cluster(tree: Node) -> ClusterConfig:
    """The keys of the cluster section that decide device and number of processes."""
    written = {
        key: node.data()
        for key in ("kind", "device", "processes", "nodes", "devices_per_node")
        if (node := tree.get("cluster", key)) is not None
    }
    try:
        return ClusterConfig.model_validate(written, strict=True)
    except ValidationError:
        return ClusterConfig()  # the schema reports the mistake later, with its line


def _side(tree: Node, sources: dict[str, SourceSummary]) -> int:
    """Side of the images that the stem sees: the smallest that a stage gives, else the median.

    Raises:
        ConfigError: no stage gives a number, and none names a source that can be inspected.
    """
    stages = [stage for stage in TRAINING if tree.get("stages", stage) is not None]
    sizes = [tree.get("stages", stage, "image_size") for stage in stages]
    given = [node.value for node in sizes if node is not None and isinstance(node.value, int)]
    if given:
        return min(given)
    names = [_dataset_of(tree, stage) for stage in stages]
    sides = [(sources.get(name) or _inspect(tree, name)).short_side for name in names]
    # Without a training stage nothing is computed before the weights' own job is known.
    return min(sides, default=auto_rules.SMALL_IMAGE)


def _facts(tree: Node, stage: str, source: SourceSummary) -> StageFacts:
    """What the rules may read. A value that is no number yet counts as its default."""

    def number(*path: str, default: int) -> int:
        node = tree.get(*path)
        return node.value if node is not None and isinstance(node.value, int) else default

    images = _training_images(tree, _dataset_of(tree, stage), source)
    cluster = _cluster(tree)
    initial = tree.get("stages", stage, "from")
    return StageFacts(
        images=images,
        fewest_images=images if source.has_validation else _fewest(source, images),
        short_side=source.short_side,
        device=device(cluster),
        processes=world_size(cluster),
        finetune=initial is not None and bool(initial.value),
        stem_stride=number(*STEM_STRIDE, default=ModelConfig.model_fields["stem_stride"].default),
        image_size=number(
            "stages", stage, "image_size", default=TrainConfig.model_fields["image_size"].default
        ),
        epochs=number("stages", stage, "epochs", default=1),
        global_batch=number(
            "stages",
            stage,
            "global_batch",
            default=TrainConfig.model_fields["global_batch"].default,
        ),
    )
