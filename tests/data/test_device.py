"""Device augmentation: pure functions of sample and position, with the published distributions."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pipeline.config.schema import AugmentConfig
from pipeline.data.device import MEAN, STD, DeviceAugment, DeviceBatch, beta_quantiles
from pipeline.data.hashing import key_of, uniforms
from pipeline.data.rng import uniform

CLASSES = 7


def batch(
    number: int, size: int = 32, first: int = 0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(number)
    images = torch.randint(0, 256, (number, size, size, 3), generator=generator).to(torch.uint8)
    labels = torch.randint(0, CLASSES, (number,), generator=generator)
    return images, labels, torch.arange(1000, 1000 + number), torch.arange(first, first + number)


def normal(images: torch.Tensor) -> torch.Tensor:
    return (
        images.permute(0, 3, 1, 2) / 255.0 - torch.tensor(MEAN).view(1, 3, 1, 1)
    ) / torch.tensor(STD).view(1, 3, 1, 1)


def untouched(images: torch.Tensor) -> torch.Tensor:
    """`normal` with the same rounding."""
    nothing = torch.zeros(len(images), dtype=torch.int64)
    return DeviceAugment(AugmentConfig(), CLASSES, 0, train=False)(
        images, nothing, nothing, nothing, 0
    ).images


def only(**changes: float) -> AugmentConfig:
    return AugmentConfig(
        **({"random_erasing": 0, "mixup": 0, "cutmix": 0, "smoothing": 0} | changes)
    )


def equal(a: DeviceBatch, b: DeviceBatch) -> bool:
    return (
        torch.equal(a.images, b.images)
        and torch.equal(a.image01, b.image01)
        and torch.equal(a.targets, b.targets)
    )


def test_the_device_numbers_are_those_of_numpy() -> None:
    samples = torch.tensor([0, 1, 5, 2**40, 14_197_121])
    ours = uniform(7, 3, samples, "erase", 6)
    theirs = uniforms(key_of("erase", 7, 3), samples.numpy(), 6)
    assert ours.dtype == torch.float32 and np.array_equal(ours.numpy(), theirs.astype(np.float32))


def test_the_numbers_are_uniform_and_independent() -> None:
    numbers = uniform(1, 2, torch.arange(20_000), "x", 4)
    assert numbers.min() >= 0 and numbers.max() < 1
    counts = torch.histc(numbers, 50, 0, 1)
    assert (
        (counts - 1600) ** 2 / 1600
    ).sum() < 100  # 49 degrees of freedom: the 99.99% point is 97
    correlations = torch.corrcoef(
        torch.cat([numbers[1:], numbers[:-1], uniform(1, 2, torch.arange(19_999), "y", 4)], 1).T
    )
    assert (correlations - torch.eye(12)).abs().max() < 0.035
    assert torch.equal(uniform(1, 2, torch.tensor([17]), "x", 4)[0], numbers[17])


def test_evaluation_only_normalises() -> None:
    images, labels, samples, positions = batch(5)
    out = DeviceAugment(AugmentConfig(), CLASSES, 0, train=False)(
        images, labels, samples, positions, 0
    )
    torch.testing.assert_close(out.images, normal(images))
    torch.testing.assert_close(out.image01, images.permute(0, 3, 1, 2) / 255.0, atol=1e-6, rtol=0)
    assert torch.equal(out.targets, torch.nn.functional.one_hot(labels, CLASSES).float())
    assert out.images.is_contiguous(memory_format=torch.channels_last)


def test_the_same_arguments_give_the_same_batch_and_another_epoch_another() -> None:
    arguments = batch(8)
    augment = DeviceAugment(AugmentConfig(), CLASSES, 5, train=True)
    again = DeviceAugment(AugmentConfig(), CLASSES, 5, train=True)
    assert equal(augment(*arguments, 2), again(*arguments, 2))
    assert not equal(augment(*arguments, 2), again(*arguments, 3))
    assert not equal(
        augment(*arguments, 2),
        DeviceAugment(AugmentConfig(), CLASSES, 6, train=True)(*arguments, 2),
    )


def test_micro_batches_give_the_images_of_the_whole_batch() -> None:
    images, labels, samples, positions = batch(24)
    augment = DeviceAugment(AugmentConfig(), CLASSES, 5, train=True)
    whole = augment(images, labels, samples, positions, 1)
    for start in range(0, 24, 6):
        part = slice(start, start + 6)
        out = augment(images[part], labels[part], samples[part], positions[part], 1)
        assert equal(out, DeviceBatch(whole.images[part], whole.image01[part], whole.targets[part]))


def test_targets_sum_to_one_with_the_published_smoothing() -> None:
    images, labels, samples, positions = batch(64)
    out = DeviceAugment(AugmentConfig(), CLASSES, 1, train=True)(
        images, labels, samples, positions, 0
    )
    torch.testing.assert_close(out.targets.sum(1), torch.ones(64))
    plain = DeviceAugment(only(smoothing=0.1), CLASSES, 1, train=True)(
        images, labels, samples, positions, 0
    )
    assert torch.allclose(
        plain.targets.gather(1, labels[:, None]), torch.tensor(0.9 + 0.1 / CLASSES)
    )
    assert torch.allclose(plain.targets.min(1).values, torch.tensor(0.1 / CLASSES))


def test_mixup_blends_neighbours_with_one_weight() -> None:
    images, labels, samples, positions = batch(40)
    labels = torch.arange(40) % 2
    out = DeviceAugment(only(mixup=0.8), CLASSES, 1, train=True)(
        images, labels, samples, positions, 0
    )
    plain, partner = normal(images), torch.arange(40) ^ 1
    weight = out.targets.gather(1, labels[:, None])[:, 0]
    assert torch.allclose(weight, weight[partner]) and len(weight.unique()) == 20
    expected = weight.view(-1, 1, 1, 1) * plain + (1 - weight).view(-1, 1, 1, 1) * plain[partner]
    torch.testing.assert_close(out.images, expected, atol=1e-5, rtol=1e-5)


def test_cutmix_swaps_one_box_and_weighs_by_its_true_area() -> None:
    images, _, samples, positions = batch(40)
    labels = torch.arange(40) % 2
    out = DeviceAugment(only(cutmix=1.0), CLASSES, 1, train=True)(
        images, labels, samples, positions, 0
    )
    plain, partner = untouched(images), torch.arange(40) ^ 1
    own = (out.images == plain).all(1)
    assert torch.equal(own | (out.images == plain[partner]).all(1), torch.ones_like(own))
    weight = out.targets.gather(1, labels[:, None])[:, 0]
    torch.testing.assert_close(
        weight, own.float().mean((1, 2)), atol=0.005, rtol=0
    )  # two random pixels may agree


def test_an_image_without_its_partner_stays_as_it_is() -> None:
    images, labels, samples, positions = batch(5, first=3)  # positions 3..7: 3 has lost 2
    out = DeviceAugment(only(mixup=0.8), CLASSES, 1, train=True)(
        images, labels, samples, positions, 0
    )
    torch.testing.assert_close(out.images[0], normal(images)[0])
    assert (out.targets[0, labels[0]] == 1 and (out.targets.max(1).values[1:] < 1).all()) or len(
        set(labels.tolist())
    ) < 5


def test_erasing_fills_boxes_of_the_published_size_with_noise() -> None:
    images, labels, samples, positions = batch(400)
    out = DeviceAugment(only(random_erasing=0.25), CLASSES, 1, train=True)(
        images, labels, samples, positions, 0
    )
    changed = (out.images != untouched(images)).all(1)
    share = changed.float().mean((1, 2))
    hit = share > 0.005
    assert 0.17 < hit.float().mean() < 0.33
    assert share[hit].min() > 0.012 and share[hit].max() < 0.36 and 0.13 < share[hit].mean() < 0.22
    rows, columns = changed.any(2).sum(1)[hit], changed.any(1).sum(1)[hit]
    assert torch.allclose(
        (rows * columns / 32**2).float(), share[hit], atol=0.02
    )  # the noise is one box
    noise = out.images.permute(0, 2, 3, 1)[changed]
    assert abs(noise.mean()) < 0.02 and abs(noise.std() - 1) < 0.02
    assert out.image01.min() >= 0 and out.image01.max() <= 1
    everything = DeviceAugment(only(random_erasing=1), CLASSES, 1, train=True)(
        images, labels, samples, positions, 0
    )
    assert ((everything.images != untouched(images)).any(1).any(2).any(1)).float().mean() > 0.98


def test_erasing_is_of_the_sample_not_of_its_place() -> None:
    images, labels, samples, positions = batch(16)
    augment = DeviceAugment(only(random_erasing=1), CLASSES, 1, train=True)
    turned = torch.arange(16).flip(0)
    out = augment(images, labels, samples, positions, 0)
    again = augment(images[turned], labels[turned], samples[turned], positions, 0)
    assert torch.equal(out.images[turned], again.images)


@pytest.mark.parametrize("alpha", [0.2, 0.8, 1.0, 3.0])
def test_beta_quantiles(alpha: float) -> None:
    table = beta_quantiles(alpha).double()
    assert table[0] == 0 and abs(table[-1] - 1) < 1e-4 and (table.diff() >= 0).all()
    middle = (table[1:] + table[:-1]) / 2
    assert abs(middle.mean() - 0.5) < 1e-3
    assert abs(middle.var() - 1 / (4 * (2 * alpha + 1))) < 2e-3
    if alpha == 1.0:
        torch.testing.assert_close(
            table, torch.linspace(0, 1, len(table), dtype=torch.float64), atol=1e-5, rtol=0
        )
