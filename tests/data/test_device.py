"""Device augmentation: pure functions of view and position, with the published distributions."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from pipeline.config.schema import AugmentConfig
from pipeline.data.device import DeviceAugment, DeviceBatch, beta_quantiles
from pipeline.data.hashing import key_of, uniforms
from pipeline.data.preprocessing import MEAN, STD
from pipeline.data.rng import uniform

CLASSES = 7


def batch(
    number: int, size: int = 32, first: int = 0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(number)
    images = torch.randint(0, 256, (number, size, size, 3), generator=generator).to(torch.uint8)
    labels = torch.randint(0, CLASSES, (number,), generator=generator)
    return images, labels, torch.arange(1000, 1000 + number), torch.arange(first, first + number)


def normalised(images: torch.Tensor) -> torch.Tensor:
    mean = torch.tensor(MEAN).view(1, 3, 1, 1)
    std = torch.tensor(STD).view(1, 3, 1, 1)
    return (images.permute(0, 3, 1, 2) / 255.0 - mean) / std


def not_augmented(images: torch.Tensor) -> torch.Tensor:
    """`normalised` with the rounding of `DeviceAugment`."""
    zeros = torch.zeros(len(images), dtype=torch.int64)
    evaluation = DeviceAugment(AugmentConfig(), CLASSES, 0, train=False)
    return evaluation(images, zeros, zeros, zeros, 0).images


def only(**keys: float) -> AugmentConfig:
    """All device augmentation off, except ``keys``."""
    off = {"random_erasing": 0, "mixup": 0, "cutmix": 0, "smoothing": 0}
    return AugmentConfig(**(off | keys))


def equal(a: DeviceBatch, b: DeviceBatch) -> bool:
    return (
        torch.equal(a.images, b.images)
        and torch.equal(a.image01(), b.image01())
        and torch.equal(a.targets, b.targets)
    )


def test_torch_and_numpy_draw_the_same_numbers() -> None:
    samples = torch.tensor([0, 1, 5, 2**40, 14_197_121])
    on_device = uniform(7, 3, samples, "erase", 6)
    on_host = uniforms(key_of("erase", 7, 3), samples.numpy(), 6)
    assert on_device.dtype == torch.float32
    assert np.array_equal(on_device.numpy(), on_host.astype(np.float32))


def test_the_numbers_are_uniform_and_independent() -> None:
    numbers = uniform(1, 2, torch.arange(20_000), "x", 4)
    assert numbers.min() >= 0
    assert numbers.max() < 1
    counts = torch.histc(numbers, 50, 0, 1)
    chi_square = ((counts - 1600) ** 2 / 1600).sum()
    assert chi_square < 100  # 49 degrees of freedom: the 99.99% point is 97
    correlations = torch.corrcoef(
        torch.cat([numbers[1:], numbers[:-1], uniform(1, 2, torch.arange(19_999), "y", 4)], 1).T
    )
    assert (correlations - torch.eye(12)).abs().max() < 0.035
    assert torch.equal(uniform(1, 2, torch.tensor([17]), "x", 4)[0], numbers[17])


def test_evaluation_only_normalises() -> None:
    images, labels, views, positions = batch(5)
    out = DeviceAugment(AugmentConfig(), CLASSES, 0, train=False)(
        images, labels, views, positions, 0
    )
    torch.testing.assert_close(out.images, normalised(images))
    torch.testing.assert_close(out.image01(), images.permute(0, 3, 1, 2) / 255.0, atol=1e-6, rtol=0)
    assert torch.equal(out.targets, torch.nn.functional.one_hot(labels, CLASSES).float())
    assert out.images.is_contiguous(memory_format=torch.channels_last)


def test_a_batch_is_a_function_of_seed_and_epoch() -> None:
    arguments = batch(8)
    augment = DeviceAugment(AugmentConfig(), CLASSES, 5, train=True)
    again = DeviceAugment(AugmentConfig(), CLASSES, 5, train=True)
    assert equal(augment(*arguments, 2), again(*arguments, 2))
    assert not equal(augment(*arguments, 2), again(*arguments, 3))
    assert not equal(
        augment(*arguments, 2),
        DeviceAugment(AugmentConfig(), CLASSES, 6, train=True)(*arguments, 2),
    )


def test_micro_batches_give_the_same_images_as_the_whole_batch() -> None:
    images, labels, views, positions = batch(24)
    augment = DeviceAugment(AugmentConfig(), CLASSES, 5, train=True)
    whole = augment(images, labels, views, positions, 1)
    for start in range(0, 24, 6):
        part = slice(start, start + 6)
        out = augment(images[part], labels[part], views[part], positions[part], 1)
        assert equal(out, replace(whole, images=whole.images[part], targets=whole.targets[part]))


def test_targets_sum_to_one_with_the_published_smoothing() -> None:
    images, labels, views, positions = batch(64)
    out = DeviceAugment(AugmentConfig(), CLASSES, 1, train=True)(
        images, labels, views, positions, 0
    )
    torch.testing.assert_close(out.targets.sum(1), torch.ones(64))
    plain = DeviceAugment(only(smoothing=0.1), CLASSES, 1, train=True)(
        images, labels, views, positions, 0
    )
    assert torch.allclose(
        plain.targets.gather(1, labels[:, None]), torch.tensor(0.9 + 0.1 / CLASSES)
    )
    assert torch.allclose(plain.targets.min(1).values, torch.tensor(0.1 / CLASSES))


def test_mixup_blends_neighbours_with_one_weight() -> None:
    images, labels, views, positions = batch(40)
    labels = torch.arange(40) % 2
    out = DeviceAugment(only(mixup=0.8), CLASSES, 1, train=True)(
        images, labels, views, positions, 0
    )
    plain = normalised(images)
    partner = torch.arange(40) ^ 1
    weight = out.targets.gather(1, labels[:, None])[:, 0]
    assert torch.allclose(weight, weight[partner])
    assert len(weight.unique()) == 20
    expected = weight.view(-1, 1, 1, 1) * plain + (1 - weight).view(-1, 1, 1, 1) * plain[partner]
    torch.testing.assert_close(out.images, expected, atol=1e-5, rtol=1e-5)


def test_cutmix_swaps_one_box_and_weighs_by_its_true_area() -> None:
    images, _, views, positions = batch(40)
    labels = torch.arange(40) % 2
    out = DeviceAugment(only(cutmix=1.0), CLASSES, 1, train=True)(
        images, labels, views, positions, 0
    )
    plain = not_augmented(images)
    partner = torch.arange(40) ^ 1
    own = (out.images == plain).all(1)
    assert torch.equal(own | (out.images == plain[partner]).all(1), torch.ones_like(own))
    weight = out.targets.gather(1, labels[:, None])[:, 0]
    # The tolerance: two random pixels may be equal.
    torch.testing.assert_close(weight, own.float().mean((1, 2)), atol=0.005, rtol=0)


def test_an_image_without_its_partner_is_not_mixed() -> None:
    images, _, views, positions = batch(5, first=3)  # positions 3..7: 3 lacks its partner 2
    labels = torch.arange(5)  # all different, so that every mixed pair shows in the targets
    out = DeviceAugment(only(mixup=0.8), CLASSES, 1, train=True)(
        images, labels, views, positions, 0
    )
    torch.testing.assert_close(out.images[0], normalised(images)[0])
    assert out.targets[0, labels[0]] == 1
    assert (out.targets.max(1).values[1:] < 1).all()


def test_erasing_fills_boxes_of_the_published_size_with_noise() -> None:
    images, labels, views, positions = batch(400)
    out = DeviceAugment(only(random_erasing=0.25), CLASSES, 1, train=True)(
        images, labels, views, positions, 0
    )
    changed = (out.images != not_augmented(images)).all(1)
    share = changed.float().mean((1, 2))
    erased = share > 0.005
    assert 0.17 < erased.float().mean() < 0.33
    assert share[erased].min() > 0.012
    assert share[erased].max() < 0.36
    assert 0.13 < share[erased].mean() < 0.22
    # The noise fills one box: as many pixels as its rows times its columns.
    rows = changed.any(2).sum(1)[erased]
    columns = changed.any(1).sum(1)[erased]
    assert torch.allclose((rows * columns / 32**2).float(), share[erased], atol=0.02)
    noise = out.images.permute(0, 2, 3, 1)[changed]
    assert abs(noise.mean()) < 0.02
    assert abs(noise.std() - 1) < 0.02
    assert out.image01().min() >= 0
    assert out.image01().max() <= 1
    everything = DeviceAugment(only(random_erasing=1), CLASSES, 1, train=True)(
        images, labels, views, positions, 0
    )
    assert ((everything.images != not_augmented(images)).any(1).any(2).any(1)).float().mean() > 0.98


def test_erasing_depends_on_the_view_not_on_the_position() -> None:
    images, labels, views, positions = batch(16)
    augment = DeviceAugment(only(random_erasing=1), CLASSES, 1, train=True)
    reverse = torch.arange(16).flip(0)
    out = augment(images, labels, views, positions, 0)
    again = augment(images[reverse], labels[reverse], views[reverse], positions, 0)
    assert torch.equal(out.images[reverse], again.images)


@pytest.mark.parametrize("alpha", [0.2, 0.8, 1.0, 3.0])
def test_beta_quantiles_have_the_mean_and_variance_of_the_distribution(alpha: float) -> None:
    table = beta_quantiles(alpha).double()
    assert table[0] == 0
    assert abs(table[-1] - 1) < 1e-4
    assert (table.diff() >= 0).all()
    middle = (table[1:] + table[:-1]) / 2
    assert abs(middle.mean() - 0.5) < 1e-3
    assert abs(middle.var() - 1 / (4 * (2 * alpha + 1))) < 2e-3
    if alpha == 1.0:
        torch.testing.assert_close(
            table, torch.linspace(0, 1, len(table), dtype=torch.float64), atol=1e-5, rtol=0
        )
