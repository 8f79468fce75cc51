"""Chooses values left to ``auto`` from the images, and tells the user the reason for each.

Keys: stages.<training>.image_size, .epochs and .global_batch, and data.<name>.validation_fraction.

Worked example: 400 images in 4 class folders, median short side 150 pixels, no validation split,
two processes on a CPU (BUDGETS["cpu"]: 96 pixels, 30,000 presentations, 4 to 60 epochs, batch 128):

    validation_fraction  400 images are at least 50 per class                -> 0.1, 360 remain
    image_size           150 pixels, rounded down to 128, limit 96           -> 96
    epochs               30,000 / 360 = 83, limit 60; fine-tuning a third    -> 60 and 20
    global_batch         2 processes x 2 = 4, doubled while an epoch keeps
                         enough steps: 8 (45 steps), 16 (22), not 32 (11)    -> 16
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pydantic import ValidationError

from pipeline.config.job_queries import TRAINING
from pipeline.config.machine import device, world_size
from pipeline.config.schema import ClusterConfig, SplitsConfig
from pipeline.config.yaml_tree.reading import Node
from pipeline.errors import ConfigError
from pipeline.sources.inspection import SourceSummary, inspect_source

AUTO = "auto"
KEYS = ("image_size", "epochs", "global_batch")


@dataclass(frozen=True, kw_only=True)
class Budget:
    """What fits into a run of minutes (cpu) or hours (cuda)."""

    image_size: int  # largest (pixels)
    presentations: int  # images shown in pretraining, over all epochs
    epochs: tuple[int, int]  # fewest, most
    batch: int  # largest global batch (images)


# Chosen for an early first result rather than the best accuracy. Every value can be set by hand.
BUDGETS = {
    "cpu": Budget(image_size=96, presentations=30_000, epochs=(4, 60), batch=128),
    "cuda": Budget(image_size=224, presentations=20_000_000, epochs=(20, 300), batch=1024),
}
SMALLEST_SIZE = 64  # pixels; two multiples of the network's stride
SMALL_BATCH = 16  # images; with fewer, overhead dominates a step
STEPS_PER_EPOCH = 20  # fewest, for a batch that is not small
STEPS_PER_EPOCH_SMALL = 4
FEW_PER_CLASS = 50  # images; with fewer, more are held out
# Rehearsals do not inspect the source. They replace these values by their own small ones.
PLACEHOLDERS = {"image_size": 64, "epochs": 1, "global_batch": 16}


@dataclass(frozen=True)
class Choice:
    """A chosen value and the reason, as a phrase for the user."""

    value: int | float
    reason: str


def choose(tree: Node, *, inspect_sources: bool) -> tuple[Node, list[str]]:
    """Replace every 'auto' in a job's tree by a chosen value.

    Args:
        inspect_sources: False for a rehearsal, which needs no source: take placeholders.

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
        if _is_auto(tree.get("stages", stage, key))
    ]
    if not inspect_sources:
        return _with_placeholders(tree, datasets, stage_keys), []
    # 1. Inspect each source once, although several keys may need it.
    names = dict.fromkeys([*datasets, *(_dataset_of(tree, stage) for stage, _ in stage_keys)])
    sources = {name: _inspect(tree, name) for name in names}
    notes = [f"data.{name}: {source.summary}" for name, source in sources.items()]
    # 2. Held-out shares first: they decide how many training images the stages have.
    for name in datasets:
        choice = _validation_fraction(sources[name])
        tree = _with_choice(tree, ("data", name, "validation_fraction"), choice, notes)
    # 3. The stages.
    for stage, key in stage_keys:
        source = sources[_dataset_of(tree, stage)]
        try:
            choice = _stage_choice(tree, stage, key, source)
        except ConfigError as error:
            place = (tree.get("stages", stage, key) or tree).origin
            cause = f"stages.{stage}.{key}: {error.cause}"
            raise ConfigError(cause, place=place, remedy=error.remedy) from None
        tree = _with_choice(tree, ("stages", stage, key), choice, notes)
    return tree, notes


def _is_auto(node: Node | None) -> bool:
    return node is not None and node.value == AUTO


def _with_placeholders(tree: Node, datasets: list[str], stage_keys: list[tuple[str, str]]) -> Node:
    for stage, key in stage_keys:
        tree = tree.replaced(("stages", stage, key), Node(PLACEHOLDERS[key], "rehearse"))
    for name in datasets:
        tree = tree.replaced(("data", name, "validation_fraction"), Node(0.1, "rehearse"))
    return tree


def _with_choice(tree: Node, path: tuple[str, ...], choice: Choice, notes: list[str]) -> Node:
    notes.append(f"{'.'.join(path)} = {choice.value}: {choice.reason}")
    return tree.replaced(path, Node(choice.value, f"chosen: {choice.reason}"))


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
    return inspect_source(root.value, layout_name, f"data.{name}.root", root.origin, splits)


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


def _cluster(tree: Node) -> ClusterConfig:
    """The keys of the cluster section that decide device and number of processes."""
    written = {
        key: node.data()
        for key in ("device", "processes")
        if (node := tree.get("cluster", key)) is not None
    }
    try:
        return ClusterConfig.model_validate(written, strict=True)
    except ValidationError:
        return ClusterConfig()  # the schema reports the mistake later, with its line


def _stage_choice(tree: Node, stage: str, key: str, source: SourceSummary) -> Choice:
    cluster = _cluster(tree)
    device_name = device(cluster)
    budget = BUDGETS[device_name]
    if key == "image_size":
        return _image_size(source, budget, device_name, finetune=stage == "finetune")
    images = _training_images(tree, _dataset_of(tree, stage), source)
    if key == "epochs":
        return _epochs(images, budget, device_name, finetune=stage == "finetune")
    return _global_batch(images, budget, world_size(cluster))


def _image_size(
    source: SourceSummary, budget: Budget, device_name: str, *, finetune: bool
) -> Choice:
    """The largest multiple of 32 that most images fill, within the budget.

    Fine-tuning on a GPU goes one step up, as the published recipes do.
    """
    # Beyond the median side most images would be enlarged: more compute, no more detail.
    size = min(budget.image_size, max(SMALLEST_SIZE, source.short_side // 32 * 32))
    if finetune and source.short_side >= size + 32 and device_name == "cuda":
        size += 32
    reason = (
        f"median short side {source.short_side} pixels, "
        f"between {SMALLEST_SIZE} and {budget.image_size} on {device_name}"
    )
    return Choice(size, reason)


def _epochs(images: int, budget: Budget, device_name: str, *, finetune: bool) -> Choice:
    """As many as the budget of presentations allows; fine-tuning takes a third of them."""
    fewest, most = budget.epochs
    epochs = min(most, max(fewest, budget.presentations // images))
    if finetune:
        epochs = max(1, epochs // 3)
    shown = epochs * images
    return Choice(epochs, f"{images} training images, about {shown} shown on {device_name}")


def _global_batch(images: int, budget: Budget, processes: int) -> Choice:
    """Twice the number of processes, doubled while an epoch keeps enough steps.

    An even batch per process, because mixup and cutmix pair the images of a micro-batch.
    """
    batch = 2 * processes
    # Too few steps per epoch train badly however many epochs follow; with tiny batches even a few
    # steps are worth doubling for. Example: 360 images, 2 processes: 4 -> 8 -> 16, see above.
    while 2 * batch <= budget.batch:
        enough = STEPS_PER_EPOCH_SMALL if batch < SMALL_BATCH else STEPS_PER_EPOCH
        if images // (2 * batch) < enough:
            break
        batch *= 2
    # 2 x processes can exceed a tiny dataset, and an epoch of zero steps would train nothing.
    if batch > images:
        cause = f"{images} training images are too few for {processes} processes"
        raise ConfigError(cause, remedy="add images, or --set cluster.processes=1")
    return Choice(batch, f"{images // batch} steps per epoch on {processes} processes")
