"""Every kind of unusable file (faults D1 and D2: damaged and unusual images) gets its reason."""

from __future__ import annotations

import gzip
import io
import random
import struct
import zlib

import cv2
import numpy as np
import pytest
import simplejpeg
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image as Pillow

from pipeline.config.schema import DatasetConfig
from pipeline.prepare.clean import CleanImage, clean
from pipeline.sources.member import LEFT_OUT, Rejection
from tests.data.small_datasets import jpeg, picture

CONFIG = DatasetConfig(root="x", min_side=16, max_pixels=1_000_000)


def encoded(mode: str, form: str) -> bytes:
    out = io.BytesIO()
    Pillow.fromarray(picture(3, 48, 40)).convert(mode).save(out, form)
    return out.getvalue()


def png16() -> bytes:
    return bytes(cv2.imencode(".png", picture(5, 48, 40)[..., ::-1].astype(np.uint16) * 257)[1])


def huge_png(side: int) -> bytes:
    """A PNG of a few bytes whose header promises side x side pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = struct.pack(">IIBBBBB", *(side, side, 8, 2, 0, 0, 0))  # 8 bits, RGB
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b""))
        + chunk(b"IEND", b"")
    )


GOOD = jpeg(1, 48, 40)
REJECTED = {
    "empty": (b"", "a.JPEG"),
    "truncated": (GOOD[: len(GOOD) // 2], "a.JPEG"),
    "undecodable": (GOOD[:20], "a.JPEG"),
    "not_an_image": (b"<html>404 not found</html>", "a.JPEG"),
    "too_small": (jpeg(2, 48, 12), "a.JPEG"),
    "too_many_pixels": (huge_png(30_000), "a.png"),
    "damaged_gzip": (gzip.compress(GOOD)[:-20], "a.JPEG"),
}


@pytest.mark.parametrize("reason", REJECTED)
def test_unusable_files_are_rejected_with_their_reason(reason: str) -> None:
    cleaned = clean(*REJECTED[reason], CONFIG)
    assert isinstance(cleaned, Rejection)
    assert cleaned.reason == reason
    assert cleaned.detail


def test_a_warning_that_other_decoders_stop_at_is_a_rejection() -> None:
    """Stray bytes between the tables: libjpeg only warns, but not every decoder continues."""
    table = GOOD.index(b"\xff\xc4")
    cleaned = clean(GOOD[:table] + b"\0" * 5 + GOOD[table:], "a.JPEG", CONFIG)
    assert cleaned == Rejection(
        "corrupt", "Corrupt JPEG data: 5 extraneous bytes before marker 0xc4", size=(48, 40)
    )


@pytest.mark.parametrize("name", ["n01/.DS_Store", "Thumbs.db", "n01/._n01_1.JPEG", "README"])
def test_files_left_by_operating_systems_are_left_out(name: str) -> None:
    cleaned = clean(GOOD, name, CONFIG)
    assert cleaned == Rejection(LEFT_OUT, "no image: a system file or a note")


@pytest.mark.parametrize("name", ["n01/1.txt", "n01/1.xml", "n01/backup.zip"])
def test_the_content_of_a_file_decides_whether_it_is_an_image(name: str) -> None:
    assert isinstance(clean(GOOD, name, CONFIG), CleanImage)
    cleaned = clean(b"a caption", name, CONFIG)
    assert cleaned == Rejection(LEFT_OUT, "no image, by its content and its ending")


@pytest.mark.parametrize(
    "data",
    [
        encoded("RGB", "PNG"),
        encoded("P", "GIF"),
        encoded("L", "PNG"),
        encoded("RGBA", "PNG"),
        encoded("CMYK", "JPEG"),
        encoded("RGB", "WEBP"),
        encoded("RGB", "TIFF"),
        png16(),
    ],
    ids=["png", "gif", "grey png", "alpha", "cmyk", "webp", "tiff", "16 bit"],
)
def test_other_formats_become_jpegs_that_look_the_same(data: bytes) -> None:
    cleaned = clean(data, "a.JPEG", CONFIG)
    assert isinstance(cleaned, CleanImage)
    assert cleaned.changed == "converted"
    assert (cleaned.width, cleaned.height) == (48, 40)
    shown = simplejpeg.decode_jpeg(cleaned.data).astype(int)
    with Pillow.open(io.BytesIO(data)) as original:
        wanted = picture(5, 48, 40) if data == png16() else np.asarray(original.convert("RGB"))
    assert np.abs(shown - wanted.astype(int)).mean() < 12


def test_good_jpegs_keep_their_bytes() -> None:
    for data in (
        GOOD,
        encoded("L", "JPEG"),
        GOOD + b"trailing bytes",
        GOOD[:-2],
    ):  # only the end marker is missing
        cleaned = clean(data, "a.JPEG", CONFIG)
        assert isinstance(cleaned, CleanImage), cleaned
        assert cleaned.data == data
        assert cleaned.changed == ""


@pytest.mark.parametrize(
    "exif", [b"Exif\0\0" + b"\xff" * 60_000, b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0MM"]
)
def test_absurd_exif_changes_nothing(exif: bytes) -> None:
    data = GOOD[:2] + b"\xff\xe1" + struct.pack(">H", len(exif) + 2) + exif + GOOD[2:]
    cleaned = clean(data, "a.JPEG", CONFIG)
    assert isinstance(cleaned, CleanImage), cleaned
    assert (cleaned.data, cleaned.width, cleaned.height, cleaned.changed) == (data, 48, 40, "")


def test_gzipped_images_are_unpacked() -> None:
    cleaned = clean(gzip.compress(GOOD), "a.JPEG", CONFIG)
    assert isinstance(cleaned, CleanImage)
    assert (cleaned.data, cleaned.changed) == (GOOD, "unpacked")


def test_a_gzip_bomb_is_not_unpacked() -> None:
    bomb = gzip.compress(bytes(300 << 20), 9)
    assert clean(bomb, "a.JPEG", CONFIG) == Rejection(
        "damaged_gzip", "does not unpack, or to more than 256 MiB"
    )


def test_large_images_are_scaled_down_and_small_ones_never_up() -> None:
    config = CONFIG.model_copy(update={"short_side": 64})
    large = clean(jpeg(1, 200, 128), "a", config)
    small = clean(jpeg(1, 60, 50), "a", config)
    assert isinstance(large, CleanImage)
    assert isinstance(small, CleanImage)
    assert (large.width, large.height, large.changed) == (100, 64, "resized")
    assert (small.width, small.height, small.changed) == (60, 50, "")


SOUND = [
    GOOD,
    encoded("CMYK", "JPEG"),
    png16(),
    encoded("P", "GIF"),
    encoded("RGBA", "PNG"),
    encoded("RGB", "WEBP"),
    encoded("RGB", "TIFF"),
    encoded("RGB", "BMP"),
    encoded("RGB", "JPEG2000"),
    encoded("L", "PPM"),
    gzip.compress(GOOD),
]


@settings(max_examples=300, deadline=None)
@given(
    which=st.integers(0, len(SOUND) - 1),
    changes=st.lists(st.tuples(st.integers(0), st.integers(0, 255)), max_size=8),
    kept=st.floats(0.0, 1.0),
)
def test_any_damaged_file_is_kept_or_rejected_with_a_reason(
    which: int, changes: list[tuple[int, int]], kept: float
) -> None:
    """Decoders raise many kinds of errors; none of them may stop the preparation of other files."""
    data = bytearray(SOUND[which])
    for offset, value in changes:
        data[offset % len(data)] = value
    cleaned = clean(bytes(data[: round(len(data) * (0.5 + kept))]), "a.JPEG", CONFIG)
    if isinstance(cleaned, CleanImage):
        assert simplejpeg.decode_jpeg_header(cleaned.data, strict=False)[:2] == (
            cleaned.height,
            cleaned.width,
        )
        assert np.isfinite(cleaned.moments).all()
    else:
        assert cleaned.reason
        assert cleaned.detail


def test_moments_are_those_of_the_pixels() -> None:
    cleaned = clean(GOOD, "a", CONFIG)
    assert isinstance(cleaned, CleanImage)
    pixels = simplejpeg.decode_jpeg(GOOD).reshape(-1, 3) / 255
    np.testing.assert_allclose(cleaned.moments[:3], pixels.mean(0), atol=0.01)
    np.testing.assert_allclose(cleaned.moments[3:], (pixels**2).mean(0), atol=0.01)


def test_a_converted_image_that_no_jpeg_can_hold_is_rejected() -> None:
    strip = io.BytesIO()
    Pillow.new("L", (32, 66_000)).save(strip, "PNG")
    config = CONFIG.model_copy(update={"max_pixels": 10_000_000})
    rejection = clean(strip.getvalue(), "scroll.png", config)
    assert rejection == Rejection(
        "too_long", "32 x 66000 pixels, a side of a JPEG at most 65500", size=(32, 66_000)
    )
    scaled = clean(strip.getvalue(), "scroll.png", config.model_copy(update={"short_side": 16}))
    assert isinstance(scaled, CleanImage)


@pytest.mark.parametrize("form", ["AVIF", "PNG", "GIF", "TIFF", "WEBP", "BMP", "ICO", "JPEG2000"])
def test_no_damage_of_a_file_ends_the_preparation(form: str) -> None:
    data = encoded("RGB", form)
    for seed in range(60):
        choices = random.Random(seed)
        damaged = bytearray(data)
        for _ in range(1 + seed % 3):
            damaged[choices.randrange(4, min(len(data), 400))] ^= 1 << choices.randrange(8)
        cut = data[: choices.randrange(len(data))]
        for content in (bytes(damaged), cut):
            assert isinstance(clean(content, "a.jpg", CONFIG), CleanImage | Rejection)


def test_the_limit_of_pixels_may_be_larger_than_that_of_pillow(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Pillow, "MAX_IMAGE_PIXELS", 100)
    png = encoded("RGB", "PNG")
    assert isinstance(clean(png, "a.png", CONFIG), CleanImage)
    small = CONFIG.model_copy(update={"max_pixels": 48 * 40 - 1})
    assert clean(png, "a.png", small) == Rejection(
        "too_many_pixels", "48 x 40 pixels, at most 1919 in all", size=(48, 40)
    )
    assert Pillow.MAX_IMAGE_PIXELS == 100, "of the process, and not ours to change"
