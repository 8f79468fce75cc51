"""One rule for the pixels of all formats, and one decoder for preparation and prediction."""

from __future__ import annotations

import io
import struct
import zlib

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image as Pillow
from PIL import PngImagePlugin, features

from pipeline.data.decode import Image, decode_any
from pipeline.data.image_files import UnusableImage, decode_file, plain_image, read_header
from tests.data.small_datasets import jpeg, picture

WIDTH = 48
HEIGHT = 40
PICTURE = picture(5, WIDTH, HEIGHT)  # RGB
GREY = PICTURE[..., 0]
TRANSPOSED = {2: 0, 3: 3, 4: 1, 5: 5, 6: 4, 7: 6, 8: 2}  # orientation of EXIF -> Pillow.Transpose


def decoded(data: bytes, *, orientation: bool = False) -> Image:
    return decode_file(data, read_header(data, orientation=orientation))


def with_opencv(ending: str, rgb: NDArray[np.generic]) -> bytes:
    pixels = rgb[..., ::-1] if rgb.ndim == 3 and rgb.shape[2] == 3 else rgb
    return bytes(cv2.imencode(ending, np.ascontiguousarray(pixels))[1])


def with_pillow(image: Pillow.Image, form: str, **options: object) -> bytes:
    out = io.BytesIO()
    image.save(out, form, **options)  # type: ignore[arg-type]
    return out.getvalue()


def difference(data: bytes, wanted: NDArray[np.generic]) -> float:
    pixels = decoded(data).astype(float)
    if wanted.ndim == 2:
        wanted = np.repeat(wanted[..., None], 3, axis=2)
    return float(np.abs(pixels - wanted.astype(float)).mean())


@pytest.mark.parametrize("bits", [10, 12, 14, 16])
@pytest.mark.parametrize("ending", [".png", ".tiff"])
@pytest.mark.parametrize("pixels", [GREY, PICTURE], ids=["grey", "colour"])
def test_integers_are_scaled_by_the_depth_that_they_use(
    bits: int, ending: str, pixels: Image
) -> None:
    top = 2**bits - 1
    deep = np.rint(pixels.astype(float) / pixels.max() * top).astype(np.uint16)
    wanted = pixels.astype(float) / pixels.max() * 255
    assert difference(with_opencv(ending, deep), wanted) < 1


@pytest.mark.parametrize("top", [1.0, 255.0, 65535.0])
@pytest.mark.parametrize("pixels", [GREY, PICTURE], ids=["grey", "colour"])
def test_floating_point_is_scaled_by_its_range(top: float, pixels: Image) -> None:
    scaled = (pixels.astype(np.float32) / pixels.max() * top).astype(np.float32)
    wanted = pixels.astype(float) / pixels.max() * 255
    assert difference(with_opencv(".tiff", scaled), wanted) < 1


@pytest.mark.parametrize("value", [-1.0, np.nan, np.inf, 1e6])
def test_pixels_of_an_unknown_range_are_refused_with_the_range(value: float) -> None:
    pixels = np.full((HEIGHT, WIDTH), 0.5, np.float32)
    pixels[3, 4] = value
    with pytest.raises(UnusableImage, match=r"pixels from .* scale them") as caught:
        decoded(with_opencv(".tiff", pixels))
    assert caught.value.reason == "unknown_range"


@pytest.mark.parametrize("form", ["PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("alpha", [0, 90, 255])
def test_alpha_changes_no_colour(form: str, alpha: int) -> None:
    image = Pillow.fromarray(PICTURE).convert("RGBA")
    image.putalpha(alpha)
    options = {"lossless": True, "exact": True} if form == "WEBP" else {}
    assert difference(with_pillow(image, form, **options), PICTURE) < 1


@pytest.mark.parametrize("mode", ["1", "L", "P", "LA", "RGB", "RGBA", "CMYK", "I;16"])
def test_every_mode_of_a_tiff_becomes_rgb(mode: str) -> None:
    image = Pillow.fromarray(PICTURE)
    if mode == "I;16":
        image = Pillow.fromarray(GREY.astype(np.uint16) * 257)
    else:
        image = image.convert(mode)
    pixels = decoded(with_pillow(image, "TIFF"))
    assert pixels.shape == (HEIGHT, WIDTH, 3)
    assert pixels.dtype == np.uint8


FORMS = ["JPEG", "PNG", "WEBP", "AVIF"]


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("pixels", [PICTURE, GREY.astype(np.uint16) * 257], ids=["8", "16"])
def test_a_tiff_is_always_upright(orientation: int, pixels: NDArray[np.generic]) -> None:
    image = Pillow.fromarray(pixels)
    data = with_pillow(image, "TIFF", tiffinfo={0x0112: orientation})
    upright = decoded(with_pillow(image, "TIFF"))
    if orientation in TRANSPOSED:
        transpose = Pillow.Transpose(TRANSPOSED[orientation])
        upright = np.asarray(Pillow.fromarray(upright).transpose(transpose))
    assert np.array_equal(decoded(data), upright)
    assert np.array_equal(decoded(data, orientation=True), upright)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("form", FORMS)
def test_the_exif_orientation_is_applied_or_ignored_in_every_format(
    form: str, orientation: int
) -> None:
    if form == "AVIF" and not features.check("avif"):
        pytest.skip("Pillow is built without AVIF")
    exif = Pillow.Exif()
    exif[0x0112] = orientation
    data = with_pillow(Pillow.fromarray(PICTURE), form, exif=exif.tobytes(), quality=95)
    stored = decoded(data).astype(float)
    assert np.abs(stored - PICTURE).mean() < 12
    wanted = Pillow.fromarray(stored.astype(np.uint8))
    if orientation in TRANSPOSED:
        wanted = wanted.transpose(Pillow.Transpose(TRANSPOSED[orientation]))
    assert np.array_equal(decoded(data, orientation=True), np.asarray(wanted))


@pytest.mark.parametrize("value", [0, 9, 300])
def test_an_orientation_without_meaning_changes_nothing(value: int) -> None:
    exif = Pillow.Exif()
    exif[0x0112] = value
    data = with_pillow(Pillow.fromarray(PICTURE), "JPEG", exif=exif.tobytes())
    assert np.array_equal(decoded(data, orientation=True), decoded(data))


def with_long_text() -> bytes:
    info = PngImagePlugin.PngInfo()
    info.add_itxt("workflow", "x" * 3_000_000, zip=True)
    return with_pillow(Pillow.fromarray(PICTURE), "PNG", pnginfo=info)


def with_many_texts() -> bytes:
    info = PngImagePlugin.PngInfo()
    for number in range(90):
        info.add_text(f"key{number}", "y" * 900_000, zip=True)
    return with_pillow(Pillow.fromarray(PICTURE), "PNG", pnginfo=info)


def with_large_profile() -> bytes:
    return with_pillow(Pillow.fromarray(PICTURE), "PNG", icc_profile=bytes(2_000_000))


def with_text_behind_the_pixels() -> bytes:
    data = with_pillow(Pillow.fromarray(PICTURE), "PNG")
    content = b"Comment\0\0" + zlib.compress(b"z" * 5_000_000)
    chunk = b"zTXt" + content
    framed = struct.pack(">I", len(content)) + chunk + struct.pack(">I", zlib.crc32(chunk))
    return data[:-12] + framed + data[-12:]


@pytest.mark.parametrize(
    "make",
    [with_long_text, with_many_texts, with_large_profile, with_text_behind_the_pixels],
)
def test_texts_and_profiles_of_any_length_are_no_reason_to_refuse(make: object) -> None:
    assert callable(make)
    assert difference(make(), PICTURE) < 1
    assert PngImagePlugin.MAX_TEXT_CHUNK == 1 << 20, "of the process, and not ours to change"


def test_heic_is_read_where_its_package_is_installed() -> None:
    heif = pytest.importorskip("pillow_heif")
    heif.register_heif_opener()
    data = with_pillow(Pillow.fromarray(PICTURE), "HEIF", quality=90)
    assert read_header(data, orientation=False).kind == "HEIF"
    assert difference(data, PICTURE) < 12


def test_heic_without_its_package_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.data.image_files.can_read_heif", lambda: False)
    with pytest.raises(UnusableImage, match="install heif") as caught:
        read_header(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(500), orientation=False)
    assert caught.value.reason == "needs_heif"


def test_a_whole_upright_jpeg_is_read_as_it_is() -> None:
    data = jpeg(1, WIDTH, HEIGHT)
    assert plain_image(data, orientation=True) == data


@pytest.mark.parametrize("form", ["GIF", "TIFF", "JPEG2000", "AVIF", "PPM", "ICO"])
def test_other_formats_are_read_as_the_pixels_that_preparation_sees(form: str) -> None:
    if form == "AVIF" and not features.check("avif"):
        pytest.skip("Pillow is built without AVIF")
    data = with_pillow(Pillow.fromarray(PICTURE), form)
    assert np.array_equal(decode_any(plain_image(data, orientation=False)), decoded(data))


@pytest.mark.parametrize("kept", [0.3, 0.6, 0.9])
def test_a_truncated_image_is_refused(kept: float) -> None:
    data = jpeg(1, 200, 160)
    with pytest.raises(UnusableImage, match="Premature end"):
        plain_image(data[: int(kept * len(data))], orientation=False)
