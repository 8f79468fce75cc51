"""Augmentations agree with Pillow, and their random choices have the stated distributions."""

from __future__ import annotations

import io
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image as Pillow
from PIL import ImageEnhance, ImageOps

from pipeline.config.schema import AugmentConfig
from pipeline.data import randaugment_ops
from pipeline.data.augment import CROP_TRIES, DRAWS, EvalTransform, TrainTransform, crop_box, cut
from pipeline.data.decode import Image
from tests.data.small_datasets import jpeg, picture

FACTOR = 1.7


def _affine(image: Pillow.Image, matrix: randaugment_ops.Matrix) -> Pillow.Image:
    return image.transform(
        image.size,
        Pillow.Transform.AFFINE,
        matrix,
        Pillow.Resampling.BILINEAR,
        fillcolor=randaugment_ops.FILL,
    )


PAIRS: dict[str, tuple[Callable[[Image], Image], Callable[[Pillow.Image], Pillow.Image]]] = {
    "autocontrast": (randaugment_ops.autocontrast, ImageOps.autocontrast),
    "equalize": (randaugment_ops.equalize, ImageOps.equalize),
    "posterize": (lambda i: randaugment_ops.posterize(i, 2), lambda i: ImageOps.posterize(i, 2)),
    "solarize": (lambda i: randaugment_ops.solarize(i, 77), lambda i: ImageOps.solarize(i, 77)),
    "color": (
        lambda i: randaugment_ops.saturate(i, FACTOR),
        lambda i: ImageEnhance.Color(i).enhance(FACTOR),
    ),
    "color less": (
        lambda i: randaugment_ops.saturate(i, 0.3),
        lambda i: ImageEnhance.Color(i).enhance(0.3),
    ),
    "contrast": (
        lambda i: randaugment_ops.contrast(i, FACTOR),
        lambda i: ImageEnhance.Contrast(i).enhance(FACTOR),
    ),
    "brightness": (
        lambda i: randaugment_ops.brighten(i, FACTOR),
        lambda i: ImageEnhance.Brightness(i).enhance(FACTOR),
    ),
    "sharpness": (
        lambda i: randaugment_ops.sharpen(i, FACTOR),
        lambda i: ImageEnhance.Sharpness(i).enhance(FACTOR),
    ),
    "blur": (
        lambda i: randaugment_ops.sharpen(i, 0.2),
        lambda i: ImageEnhance.Sharpness(i).enhance(0.2),
    ),
    "rotate": (
        lambda i: randaugment_ops.rotate(i, 23.0),
        lambda i: i.rotate(23.0, Pillow.Resampling.BILINEAR, fillcolor=randaugment_ops.FILL),
    ),
    "shear x": (
        lambda i: randaugment_ops.affine(i, (1, 0.27, 0, 0, 1, 0)),
        lambda i: _affine(i, (1, 0.27, 0, 0, 1, 0)),
    ),
    "shear y": (
        lambda i: randaugment_ops.affine(i, (1, 0, 0, -0.2, 1, 0)),
        lambda i: _affine(i, (1, 0, 0, -0.2, 1, 0)),
    ),
    "translate": (
        lambda i: randaugment_ops.affine(i, (1, 0, 9.3, 0, 1, -4)),
        lambda i: _affine(i, (1, 0, 9.3, 0, 1, -4)),
    ),
}


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("size", [(32, 32), (97, 64)])
def test_operations_agree_with_pillow(name: str, size: tuple[int, int]) -> None:
    ours, pillow = PAIRS[name]
    for number in range(5):
        image = picture(number, *size) // 2 + 40
        expected = np.asarray(pillow(Pillow.fromarray(image))).astype(int)
        difference = np.abs(ours(image.copy()).astype(int) - expected)
        # Rounding, and in affine maps the border: OpenCV blends it with the fill, Pillow does not.
        assert np.quantile(difference, 0.93) <= 2, name
        assert difference.mean() < 3.0, name


def test_randaugment_has_the_published_operations_and_strengths() -> None:
    assert len(randaugment_ops.OPERATIONS) == 15
    image = picture(1, 40, 40)
    draws = [0.0, 0.0, 0.0, 0.25, 0.9]  # zero deviation
    results = {}
    for i, name in enumerate(randaugment_ops.OPERATIONS):
        draws[0] = (i + 0.5) / 15
        results[name] = randaugment_ops.randaugment(image, draws, 9, 0.5)
    assert np.array_equal(results["Invert"], 255 - image)
    assert np.array_equal(results["PosterizeIncreasing"], image & 0b10000000)
    assert np.array_equal(results["SolarizeIncreasing"], np.where(image < 26, image, 255 - image))
    assert np.array_equal(
        results["SolarizeAdd"],
        np.where(image < 128, np.minimum(image.astype(int) + 99, 255), image),
    )
    assert np.array_equal(results["BrightnessIncreasing"], randaugment_ops.brighten(image, 1.81))
    not_applied = randaugment_ops.randaugment(image, [0.5, 0.5, 0.3, 0.3, 0.3], 9, 0.5)
    assert np.array_equal(not_applied, image)


@given(
    st.integers(1, 400),
    st.integers(1, 400),
    st.lists(st.floats(0, 0.999), min_size=DRAWS, max_size=DRAWS),
)
@settings(max_examples=200, deadline=None)
def test_crops_are_inside_the_image(height: int, width: int, draws: list[float]) -> None:
    top, left, box_height, box_width = crop_box(height, width, draws, AugmentConfig())
    assert top >= 0
    assert left >= 0
    assert box_height >= 1
    assert box_width >= 1
    assert top + box_height <= height
    assert left + box_width <= width


def test_crop_areas_and_positions_are_uniform() -> None:
    draws = TrainTransform(64, AugmentConfig(), 0).draws(0, np.arange(4000))
    assert np.asarray(draws).shape == (4000, DRAWS)
    boxes = np.array(
        [crop_box(300, 300, row, AugmentConfig(crop_scale=(0.1, 0.5))) for row in draws],
        dtype=float,
    )
    share = boxes[:, 2] * boxes[:, 3] / 90_000
    assert abs(share.mean() - 0.3) < 0.01
    assert share.min() > 0.09
    assert share.max() < 0.51
    assert abs((boxes[:, 0] + boxes[:, 2] / 2).mean() - 150) < 3
    assert abs((boxes[:, 3] / boxes[:, 2] > 1).mean() - 0.5) < 0.03


SHIFT_ONLY = AugmentConfig(
    crop_scale=(1, 1), crop_ratio=(1, 1), crop_padding=0.125, randaugment=0, color_jitter=0, flip=0
)


def test_padding_moves_a_crop_of_the_whole_image_both_ways() -> None:
    draws = TrainTransform(32, SHIFT_ONLY, 0).draws(0, np.arange(2000))
    boxes = np.array([crop_box(32, 32, row, SHIFT_ONLY) for row in draws])
    assert (boxes[:, 2:] == 32).all()
    for offsets in boxes[:, :2].T:
        assert set(offsets) == set(range(-4, 5))
        assert abs(offsets.mean()) < 0.3


@pytest.mark.parametrize("encode", ["JPEG", "PNG"])
def test_pixels_outside_the_image_are_mirrored(encode: str) -> None:
    saved = io.BytesIO()
    Pillow.fromarray(picture(3, 32, 32)).save(saved, encode, quality=95)
    padded = np.pad(
        np.asarray(Pillow.open(saved)).astype(int), ((4, 4), (4, 4), (0, 0)), mode="reflect"
    )
    out = np.zeros((32, 32, 3), dtype=np.uint8)
    transform = TrainTransform(32, SHIFT_ONLY, 1)
    for draws in transform.draws(0, np.arange(20)):
        transform(memoryview(saved.getvalue()), draws, out)
        top, left, _, _ = crop_box(32, 32, draws, SHIFT_ONLY)
        expected = padded[top + 4 : top + 36, left + 4 : left + 36]
        assert np.abs(out.astype(int) - expected).mean() < 4  # decoders differ


@given(
    st.integers(1, 400),
    st.integers(1, 400),
    st.floats(0, 0.5),
    st.lists(st.floats(0, 0.999), min_size=DRAWS, max_size=DRAWS),
)
@settings(max_examples=200, deadline=None)
def test_half_of_a_padded_crop_shows_the_image(
    height: int, width: int, padding: float, draws: list[float]
) -> None:
    image = np.zeros((height, width, 3), dtype=np.uint8)
    box = crop_box(height, width, draws, AugmentConfig(crop_padding=padding))
    top, left, box_height, box_width = box
    assert cut(image, box).shape == (box_height, box_width, 3)
    assert min(top + box_height, height) - max(top, 0) >= box_height / 2
    assert min(left + box_width, width) - max(left, 0) >= box_width / 2


def test_the_same_view_in_the_same_epoch_gives_the_same_image() -> None:
    transform = TrainTransform(48, AugmentConfig(), 7)
    data = memoryview(jpeg(3, 90, 70))

    def image(epoch: int, view: int) -> Image:
        out = np.zeros((48, 48, 3), dtype=np.uint8)
        transform(data, transform.draws(epoch, np.array([view]))[0], out)
        return out

    assert np.array_equal(image(2, 5), image(2, 5))
    assert not np.array_equal(image(2, 5), image(3, 5))
    assert not np.array_equal(image(2, 5), image(2, 6))


def test_scaled_decoding_gives_the_same_crop() -> None:
    crop_and_flip = AugmentConfig(randaugment=0, color_jitter=0)
    data = jpeg(4, 640, 480)
    whole = np.asarray(Pillow.open(io.BytesIO(data)))
    out = np.zeros((56, 56, 3), dtype=np.uint8)
    transform = TrainTransform(56, crop_and_flip, 1)
    for draws in transform.draws(0, np.arange(20)):
        transform(memoryview(data), draws, out)
        top, left, height, width = crop_box(480, 640, draws, crop_and_flip)
        part = Pillow.fromarray(whole[top : top + height, left : left + width]).resize(
            (56, 56), Pillow.Resampling.BOX
        )
        flipped = draws[2 * CROP_TRIES + 2] < 0.5
        expected = np.asarray(ImageOps.mirror(part) if flipped else part).astype(int)
        assert np.abs(out.astype(int) - expected).mean() < 4


@pytest.mark.parametrize("size", [(320, 200), (48, 90), (16, 16)])
def test_evaluation_takes_the_centre_crop(size: tuple[int, int]) -> None:
    data = jpeg(5, *size, quality=98)
    out = np.zeros((64, 64, 3), dtype=np.uint8)
    EvalTransform(64, 1.143)(memoryview(data), out)
    short = round(64 * 1.143)
    scale = short / min(size)
    image = Pillow.open(io.BytesIO(data)).resize((round(size[0] * scale), round(size[1] * scale)))
    left = (image.width - 64) // 2
    top = (image.height - 64) // 2
    expected = np.asarray(image.crop((left, top, left + 64, top + 64))).astype(int)
    assert np.abs(out.astype(int) - expected).mean() < 4
