"""The networks that ``bench small`` compares with, trained in one plain loop.

Both are trained like any small network in a tutorial: AdamW, one cycle of the learning rate, label
smoothing, and flipped and shifted images. The budget is time, not epochs, so a network that needs
longer for an epoch trains for fewer of them.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypedDict

import torch
from torch import Tensor, nn
from torch.nn import functional

from pipeline.bench.small_images import TEST, TRAIN, load_split
from pipeline.data.preprocessing import MEAN, STD
from pipeline.runtime.torchvision_import import import_torchvision

EVALUATIONS = 8  # points of the learning curve; each costs a pass over the test images
EVALUATION_BATCH = 250
SMALL_STEM_BELOW = 96  # pixels: ResNet's own stem and max-pool shrink an image by 4 at once
WARM_UP = 0.15  # of the budget
SHIFT = 1 / 8  # largest shift, of the side
SMOOTHING = 0.1


@dataclass(frozen=True, kw_only=True)
class SmallCase:
    """One training.

    network: a key of NETWORKS.
    directory: as written by `write_subset`.
    seconds: of training, without the evaluations for the curve.
    mixup: parameter of the Beta distribution (0: off).
    """

    network: str
    directory: str
    seed: int
    seconds: float
    threads: int
    image_size: int
    mixup: float
    batch: int = 64


class CurvePoint(TypedDict):
    """Accuracy after some time."""

    seconds: float
    top1: float


class SmallMetrics(TypedDict):
    """Result of one training; ``top1`` is that of the last weights."""

    network: str
    design: str  # in words
    seed: int
    seconds: float
    top1: float
    parameters: int
    curve: list[CurvePoint]


@dataclass(frozen=True, kw_only=True)
class Baseline:
    """How a network is built, from (classes, image_size), what it is in words, and its rate."""

    build: Callable[[int, int], nn.Module]
    design: Callable[[int], str]
    peak_lr: float
    packages: tuple[str, ...] = field(default=())  # beyond those of training


def _convolution(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, padding=1, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(),
    )


def plain_cnn(classes: int, image_size: int) -> nn.Module:
    """Five convolutions of 3x3 in three resolutions: 140,000 parameters for 6 classes."""
    layers = [
        *(_convolution(3, 32), _convolution(32, 32), nn.MaxPool2d(2)),
        *(_convolution(32, 64), _convolution(64, 64), nn.MaxPool2d(2)),
        *(_convolution(64, 128), nn.AdaptiveAvgPool2d(1), nn.Flatten()),
        nn.Linear(128, classes),
    ]
    return nn.Sequential(*layers)


def resnet18(classes: int, image_size: int) -> nn.Module:
    """torchvision's ResNet-18, for small images with a stem that keeps their resolution."""
    network: nn.Module = import_torchvision("torchvision.models").resnet18(num_classes=classes)
    if image_size < SMALL_STEM_BELOW:
        network.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
        network.maxpool = nn.Identity()
    return network


def _resnet_design(image_size: int) -> str:
    if image_size < SMALL_STEM_BELOW:
        return "torchvision's ResNet-18 with a stem of 3x3, stride 1, without max-pool"
    return "torchvision's ResNet-18 as it is"


NETWORKS = {
    "cnn": Baseline(build=plain_cnn, design=lambda _: "five convolutions of 3x3", peak_lr=3e-3),
    "resnet18": Baseline(
        build=resnet18, design=_resnet_design, peak_lr=1e-3, packages=("torchvision",)
    ),
}


def one_cycle(progress: float) -> float:
    """Factor on the peak learning rate at ``progress`` (0 to 1): a cosine up, then one to zero.

    Example: 0.04 at the start, 1 after 15% of the budget, 0.5 in the middle of the rest.
    """
    if progress < WARM_UP:
        return 0.04 + 0.96 * (1 - math.cos(math.pi * progress / WARM_UP)) / 2
    return (1 + math.cos(math.pi * min(1.0, (progress - WARM_UP) / (1 - WARM_UP)))) / 2


def augment(images: Tensor, random: torch.Generator) -> Tensor:
    """Flip half of the images and shift each by up to an eighth of its side; uint8 in and out."""
    count, _, size, _ = images.shape
    flips = torch.rand(count, generator=random) < 0.5
    images = torch.where(flips[:, None, None, None], images.flip(3), images)
    margin = round(size * SHIFT)
    padded = functional.pad(images, (margin, margin, margin, margin))
    corners = torch.randint(0, 2 * margin + 1, (count, 2), generator=random).tolist()
    return torch.stack(
        [
            image[:, top : top + size, left : left + size]
            for image, (top, left) in zip(padded, corners, strict=True)
        ]
    )


def _normalised(images: Tensor) -> Tensor:
    mean = torch.tensor(MEAN).view(1, 3, 1, 1)
    std = torch.tensor(STD).view(1, 3, 1, 1)
    return (images.float() / 255 - mean) / std


class Training:
    """A network in training, with its clock: evaluations do not count."""

    def __init__(self, case: SmallCase) -> None:
        self.case = case
        # torch.manual_seed: initial weights and mixup; the generator: order, flips and shifts.
        torch.manual_seed(case.seed)
        self.random = torch.Generator().manual_seed(case.seed)
        self.images, self.labels = load_split(Path(case.directory) / TRAIN, case.image_size)
        self.test_images, self.test_labels = load_split(
            Path(case.directory) / TEST, case.image_size
        )
        self.classes = int(self.labels.max()) + 1
        self.network = NETWORKS[case.network].build(self.classes, case.image_size)
        self.optimizer = self._optimizer()
        self.seconds = 0.0
        self.steps = 0

    def _optimizer(self) -> torch.optim.Optimizer:
        parameters = list(self.network.parameters())
        # As in the job: no weight decay on biases and norms.
        groups = [
            {"params": [value for value in parameters if value.ndim > 1], "weight_decay": 0.05},
            {"params": [value for value in parameters if value.ndim <= 1], "weight_decay": 0.0},
        ]
        return torch.optim.AdamW(groups)

    def step(self, batch: Tensor) -> None:
        """Train on the images of the given indices."""
        started = time.perf_counter()
        self.network.train()
        rate = one_cycle(self.seconds / self.case.seconds) * NETWORKS[self.case.network].peak_lr
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        images = _normalised(augment(self.images[batch], self.random))
        targets = functional.one_hot(self.labels[batch], self.classes).float()
        images, targets = self._mixed(images, targets)
        loss = functional.cross_entropy(self.network(images), targets, label_smoothing=SMOOTHING)
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.network.parameters(), 5.0)
        self.optimizer.step()
        self.steps += 1
        self.seconds += time.perf_counter() - started

    def _mixed(self, images: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Mixup with the same batch in another order, if it is on."""
        if not self.case.mixup:
            return images, targets
        share = float(torch.distributions.Beta(self.case.mixup, self.case.mixup).sample())
        order = torch.randperm(len(images), generator=self.random)
        mixed = share * images + (1 - share) * images[order]
        return mixed, share * targets + (1 - share) * targets[order]

    @torch.no_grad()
    def accuracy(self) -> float:
        """Top-1 on the test images."""
        self.network.eval()
        right = 0
        batches = zip(
            self.test_images.split(EVALUATION_BATCH),
            self.test_labels.split(EVALUATION_BATCH),
            strict=True,
        )
        for images, labels in batches:
            right += int((self.network(_normalised(images)).argmax(1) == labels).sum())
        return right / len(self.test_labels)

    def run(self) -> list[CurvePoint]:
        """Train until the budget is spent; the accuracy at regular times, the last at the end."""
        curve: list[CurvePoint] = []
        size = min(self.case.batch, len(self.images))
        while self.seconds < self.case.seconds:
            order = torch.randperm(len(self.images), generator=self.random)
            for batch in order[: len(order) // size * size].split(size):
                self.step(batch)
                spent = self.seconds >= self.case.seconds
                if spent or self.seconds >= (len(curve) + 1) * self.case.seconds / EVALUATIONS:
                    curve.append({"seconds": self.seconds, "top1": self.accuracy()})
                if spent:
                    break
        return curve


def measure(case: SmallCase) -> SmallMetrics:
    """Train one network in this process."""
    torch.set_num_threads(case.threads)
    training = Training(case)
    curve = training.run()
    epochs = training.steps * min(case.batch, len(training.images)) / len(training.images)
    return {
        "network": case.network,
        "design": f"{NETWORKS[case.network].design(case.image_size)}; {epochs:.1f} epochs",
        "seed": case.seed,
        "seconds": training.seconds,
        "top1": curve[-1]["top1"],
        "parameters": sum(value.numel() for value in training.network.parameters()),
        "curve": curve,
    }


if __name__ == "__main__":
    print(json.dumps(measure(SmallCase(**json.loads(sys.argv[1])))))
