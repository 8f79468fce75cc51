"""Rules of the values that a training stage leaves to ``auto``, each with its reason.

Worked example: 400 images in 4 class folders, median short side 150 pixels, no validation split
(a tenth is held out, 360 remain), two processes on a CPU (BUDGETS["cpu"]):

    stem_stride      images of 96 pixels or more have the published stem   -> 4
    image_size       150 pixels, rounded down to 128, limit 96             -> 96
    epochs           96 / 4 = 24, so an image has 24 * 24 = 576 positions;
                     43 million / 576 / 360 = 207, limit 100               -> 100
    global_batch     2 processes x 2 = 4, doubled while an epoch keeps
                     enough steps: 8 (45 steps), 16 (22), not 32 (11)      -> 16
    warm-up          a tenth of the epochs                                 -> 10
    evaluation and   ten per stage: every 10 epochs of 22 steps            -> 10 and 220
    checkpoints
    crops            96 pixels or more: as a rule, half of the area or more
    mixup, cutmix    100 epochs are between 20 and 200: mild               -> 0.2 each
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from pipeline.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Budget:
    """What fits into a run of minutes (cpu) or hours (cuda)."""

    image_size: int  # largest (pixels)
    positions: int  # of level 0 (pixels / stem stride squared), over all images shown
    epochs: tuple[int, int]  # fewest, most
    batch: int  # largest global batch (images)


# Every value can be set by hand; these give a useful network in the time of a coffee (cpu) or of a
# night (cuda: 20 million images of 224 pixels, 56 x 56 positions each).
BUDGETS = {
    "cpu": Budget(image_size=96, positions=43_000_000, epochs=(4, 100), batch=128),
    "cuda": Budget(image_size=224, positions=20_000_000 * 56**2, epochs=(20, 300), batch=1024),
}
SMALL_IMAGE = 96  # pixels; smaller ones get a finer stem instead of being enlarged
SMALL_STEM_STRIDE = 2
STEM_STRIDE = 4
SMALL_BATCH = 16  # images; with fewer, overhead dominates a step
STEPS_PER_EPOCH = 20  # fewest, for a batch that is not small
STEPS_PER_EPOCH_SMALL = 4
WARMUP_SHARE = 0.1  # of the epochs
EVALUATIONS = 10  # per stage
MANY_EPOCHS = 200  # from here on, mixing as published, whose schedules have 300 epochs
FEW_EPOCHS = 20  # up to here, the images are too new to be learnt by heart


@dataclass(frozen=True)
class Choice:
    """A chosen value and the reason, as a phrase for the user."""

    value: int | float | list[float]
    reason: str


@dataclass(frozen=True, kw_only=True)
class StageFacts:
    """Facts about a training stage, and the values that it has so far.

    Attributes:
        images: of the training split, about.
        fewest_images: of the training split, whichever images are held out.
        short_side: median of the images, in pixels.
        finetune: the stage starts from trained weights.
        stem_stride, image_size, epochs, global_batch: as written or chosen; rules that run before
            the choice of a value do not read it.
    """

    images: int
    fewest_images: int
    short_side: int
    device: str
    processes: int
    finetune: bool
    stem_stride: int
    image_size: int
    epochs: int
    global_batch: int

    @property
    def budget(self) -> Budget:
        return BUDGETS[self.device]

    @property
    def steps_per_epoch(self) -> int:
        return max(1, self.images // self.global_batch)


Rule = Callable[[StageFacts], Choice]


def stem_stride(side: int) -> Choice:
    """Stride of the stem for images of ``side`` pixels (the median, or the stages' image size)."""
    if side < SMALL_IMAGE:
        return Choice(SMALL_STEM_STRIDE, f"images of {side} pixels are not enlarged")
    return Choice(STEM_STRIDE, f"{side} pixels, {SMALL_IMAGE} or more")


def _image_size(facts: StageFacts) -> Choice:
    """The largest multiple of the network's stride that most images fill, within the budget.

    Fine-tuning on a GPU goes one step up, as the published recipes do.
    """
    # Beyond the median side most images would be enlarged: more compute, no more detail.
    stride = 8 * facts.stem_stride
    smallest = 2 * stride
    largest = facts.budget.image_size
    size = min(largest, max(smallest, facts.short_side // stride * stride))
    if facts.finetune and facts.short_side >= size + stride and facts.device == "cuda":
        size += stride
    reason = (
        f"median short side {facts.short_side} pixels, "
        f"between {smallest} and {largest} on {facts.device}, a multiple of {stride}"
    )
    return Choice(size, reason)


def _epochs(facts: StageFacts) -> Choice:
    """As many as the budget allows for images of this size; fine-tuning takes a third of them."""
    fewest, most = facts.budget.epochs
    positions = (facts.image_size // facts.stem_stride) ** 2
    shown = facts.budget.positions // positions
    epochs = min(most, max(fewest, shown // facts.images))
    if facts.finetune:
        epochs = max(1, epochs // 3)
    reason = f"{facts.images} training images, about {epochs * facts.images} shown"
    return Choice(epochs, f"{reason} on {facts.device}")


def _global_batch(facts: StageFacts) -> Choice:
    """Twice the number of processes, doubled while an epoch keeps enough steps.

    An even batch per process, because mixup and cutmix pair the images of a micro-batch.
    """
    batch = 2 * facts.processes
    if batch > facts.fewest_images:
        batch = facts.processes  # nothing is mixed then
    # Too few steps per epoch train badly however many epochs follow; with tiny batches even a few
    # steps are worth doubling for. Example: 360 images, 2 processes: 4 -> 8 -> 16, see above.
    while 2 * batch <= facts.budget.batch:
        enough = STEPS_PER_EPOCH_SMALL if batch < SMALL_BATCH else STEPS_PER_EPOCH
        if facts.images // (2 * batch) < enough:
            break
        batch *= 2
    # 2 x processes can exceed a tiny dataset, and an epoch of zero steps would train nothing.
    if batch > facts.fewest_images:
        about = f"{facts.images} training images"
        if facts.fewest_images < facts.images:
            about += f" (or {facts.fewest_images}: chance decides which are held out)"
        cause = f"{about} are too few for {facts.processes} processes"
        raise ConfigError(cause, remedy="add images, or --set cluster.processes=1")
    return Choice(batch, f"{facts.images // batch} steps per epoch on {facts.processes} processes")


def _warmup_epochs(facts: StageFacts) -> Choice:
    return Choice(round(WARMUP_SHARE * facts.epochs, 1), "a tenth of the epochs")


def _eval_every_epochs(facts: StageFacts) -> Choice:
    # Epochs of few images pass in a second or two, and an evaluation would take as long again.
    return Choice(
        max(1, round(facts.epochs / EVALUATIONS)), f"about {EVALUATIONS} evaluations per stage"
    )


def _checkpoint_every_steps(facts: StageFacts) -> Choice:
    steps = max(1, round(facts.epochs / EVALUATIONS)) * facts.steps_per_epoch
    return Choice(steps, f"about {EVALUATIONS} checkpoints per stage")


def _crops(small: float | list[float], usual: float | list[float]) -> Rule:
    """Small images are only moved; larger ones are also cut and resized.

    A crop that is enlarged blurs the few pixels that a small image has. Measured on 1,800 images of
    32 pixels after 36 epochs: 62% where they are moved by up to an eighth, 57% where crops of 70 to
    100% of the area are moved as far.
    """

    def choose(facts: StageFacts) -> Choice:
        if facts.image_size < SMALL_IMAGE:
            return Choice(small, f"images of {facts.image_size} pixels are moved, not resized")
        return Choice(usual, f"{facts.image_size} pixels, {SMALL_IMAGE} or more")

    return choose


def _mixing(strong: float, mild: float) -> Rule:
    """Mixing of images, which keeps a network from learning them by heart but slows it down."""

    def choose(facts: StageFacts) -> Choice:
        if facts.global_batch < 2 * facts.processes:
            return Choice(0.0, "one image per process and step has no other to mix with")
        reason = f"each image is shown {facts.epochs} times"
        if facts.epochs >= MANY_EPOCHS:
            return Choice(strong, reason)
        return Choice(mild if facts.epochs > FEW_EPOCHS else 0.0, reason)

    return choose


# Key of a training stage -> its rule. A rule may read the values of the keys above its own.
RULES: dict[str, Rule] = {
    "image_size": _image_size,
    "epochs": _epochs,
    "global_batch": _global_batch,
    "warmup_epochs": _warmup_epochs,
    "eval_every_epochs": _eval_every_epochs,
    "checkpoint_every_steps": _checkpoint_every_steps,
    "augment.crop_scale": _crops([1.0, 1.0], [0.5, 1.0]),
    "augment.crop_ratio": _crops([1.0, 1.0], [0.75, 1.3333]),
    "augment.crop_padding": _crops(0.125, 0.0),
    "augment.mixup": _mixing(0.8, 0.2),
    "augment.cutmix": _mixing(1.0, 0.2),
}
# Rehearsals do not inspect the source. They replace most of these values by their own small ones.
PLACEHOLDERS: dict[str, int | float | list[float]] = {
    "image_size": 64,
    "epochs": 4,
    "global_batch": 16,
    "warmup_epochs": 0.1,
    "eval_every_epochs": 1,
    "checkpoint_every_steps": 4,
    "augment.crop_scale": [0.5, 1.0],
    "augment.crop_ratio": [0.75, 1.3333],
    "augment.crop_padding": 0.125,
    "augment.mixup": 0.8,
    "augment.cutmix": 1.0,
}
