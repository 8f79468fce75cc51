"""The pixel work on a CPU: the bits of the masked operations, without their passes over memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from pipeline.config.schema import AugmentConfig
from pipeline.data import device_pixels
from pipeline.data.device import DeviceAugment, DeviceBatch

CLASSES = 5


class Allocations(TorchDispatchMode):
    """Counts new blocks of memory of at least ``smallest`` bytes."""

    def __init__(self, smallest: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.smallest = smallest
        self.count = 0
        self.blocks: dict[int, torch.UntypedStorage] = {}  # alive, so that no address is reused

    def __torch_dispatch__(
        self,
        func: Callable[..., object],
        types: Sequence[type],
        args: tuple[object, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> object:
        for value in args:
            self._is_new(value)
        result = func(*args, **(kwargs or {}))
        self.count += self._is_new(result)
        return result

    def _is_new(self, value: object) -> bool:
        if not isinstance(value, Tensor) or value.untyped_storage().nbytes() < self.smallest:
            return False
        block = value.untyped_storage()
        known = block.data_ptr() in self.blocks
        self.blocks[block.data_ptr()] = block
        return not known


def augmented(config: AugmentConfig, number: int, side: tuple[int, int]) -> DeviceBatch:
    generator = torch.Generator().manual_seed(number)
    images = torch.randint(0, 256, (number, *side, 3), generator=generator).to(torch.uint8)
    labels = torch.arange(number) % CLASSES
    augment = DeviceAugment(config, CLASSES, 3, train=True)
    # Position 3 lacks its partner, so one image is not mixed.
    return augment(images, labels, torch.arange(number), torch.arange(3, 3 + number), 1)


@pytest.mark.parametrize("side", [(32, 32), (17, 40)])
@pytest.mark.parametrize(
    "config",
    [
        AugmentConfig(),
        AugmentConfig(random_erasing=1.0),
        AugmentConfig(random_erasing=0, cutmix=0),
        AugmentConfig(random_erasing=0, mixup=0),
        AugmentConfig(random_erasing=0, mixup=0, cutmix=0),
    ],
)
def test_in_place_and_masked_operations_give_the_same_bits(
    config: AugmentConfig, side: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    in_place = augmented(config, 21, side)
    monkeypatch.setattr(device_pixels, "erase_in_place", device_pixels.erase_by_mask)
    monkeypatch.setattr(device_pixels, "mix_in_place", device_pixels.mix_by_mask)
    masked = augmented(config, 21, side)
    assert torch.equal(in_place.images, masked.images)
    assert torch.equal(in_place.targets, masked.targets)


def test_normalisation_in_chunks_gives_the_bits_of_one_pass(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    chunks = augmented(AugmentConfig(), 9, (64, 48))
    in_chunks = chunks.images, chunks.image01()
    monkeypatch.setattr(device_pixels, "CHUNK", 1 << 40)
    whole = augmented(AugmentConfig(), 9, (64, 48))
    assert torch.equal(in_chunks[0], whole.images)
    assert torch.equal(in_chunks[1], whole.image01())


def test_a_batch_on_a_cpu_allocates_one_float_batch() -> None:
    # The time of this work is that of writing fresh memory. Separate passes need seven such blocks.
    number, side = 16, 64
    images = torch.zeros((number, side, side, 3), dtype=torch.uint8)
    labels = torch.zeros(number, dtype=torch.int64)
    positions = torch.arange(number)
    augment = DeviceAugment(AugmentConfig(random_erasing=1.0), CLASSES, 3, train=True)
    augment(images, labels, positions, positions, 0)  # computes the constants
    with Allocations(smallest=images.numel() * 4) as allocations:
        augment(images, labels, positions, positions, 0)
    assert allocations.count == 1
