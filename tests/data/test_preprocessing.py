"""The pixels of an evaluation: Pillow's definition, and those of timm and transformers."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from pipeline.data.preprocessing import Mode, Preprocessing
from tests.data.small_datasets import jpeg

ROOT = Path(__file__).resolve().parents[2]
Pixels = NDArray[np.uint8]


def prepared(data: bytes, size: int, mode: Mode = "published") -> Pixels:
    out = np.empty((size, size, 3), dtype=np.uint8)
    Preprocessing(size, mode).transform()(memoryview(data), out)
    return out


def encoded(image: Image.Image, form: str = "PNG") -> bytes:
    file = io.BytesIO()
    image.save(file, form)
    return file.getvalue()


def noise(width: int, height: int) -> Image.Image:
    pixels = np.random.default_rng(width).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@pytest.mark.parametrize(
    ("width", "height", "resized", "corner"),
    [
        (500, 375, (341, 256), (58, 16)),  # 341.33 is cut off; 58.5 is rounded to even
        (375, 500, (256, 341), (16, 58)),
        (300, 300, (256, 256), (16, 16)),
        (100, 40, (640, 256), (208, 16)),  # enlarged
        (1023, 257, (1019, 256), (398, 16)),  # 397.5 is rounded to even
    ],
)
def test_up_to_224_pixels_the_centre_is_cropped(
    width: int, height: int, resized: tuple[int, int], corner: tuple[int, int]
) -> None:
    image = noise(width, height)
    left, top = corner
    expected = image.resize(resized, Image.Resampling.BICUBIC)
    expected = expected.crop((left, top, left + 224, top + 224))
    assert np.array_equal(prepared(encoded(image), 224), np.asarray(expected))


@pytest.mark.parametrize("size", [384, 640])
def test_above_224_pixels_the_image_is_resized_to_the_square(size: int) -> None:
    image = noise(500, 375)
    expected = image.resize((size, size), Image.Resampling.BICUBIC)
    assert np.array_equal(prepared(encoded(image), size), np.asarray(expected))


@pytest.mark.parametrize("mode", ["L", "RGBA", "CMYK", "P", "1"])
def test_every_kind_of_pixel_becomes_rgb(mode: str) -> None:
    image = noise(60, 50).convert(mode)
    form = "TIFF" if mode == "CMYK" else "PNG"
    data = encoded(image, form)
    expected = (
        Image.open(io.BytesIO(data)).convert("RGB").resize((320, 320), Image.Resampling.BICUBIC)
    )
    assert np.array_equal(prepared(data, 320), np.asarray(expected))


@pytest.mark.parametrize("data", [b"", b"no image", jpeg(1, 90, 100)[:200]])
def test_what_is_no_image_raises_a_value_error(data: bytes) -> None:
    with pytest.raises(ValueError, match=r"\w"):
        prepared(data, 224)


def test_a_description_in_words_says_what_is_done() -> None:
    assert "short side to 256" in Preprocessing(224, "published").steps
    assert "square" in Preprocessing(384, "published").steps
    assert "short side to 73" in Preprocessing(64).steps
    assert "short side to 64" in Preprocessing(64, "whole").steps


# In a process of its own, which alone imports timm and transformers. Without mean and standard
# deviation, so that pixels are compared and not the rounding of a division.
COMPARED = """
import json, sys
from pathlib import Path
import numpy as np
from PIL import Image
from pipeline.data.preprocessing import Preprocessing
from pipeline.runtime.torchvision_import import import_torchvision
import_torchvision()
from timm.data import create_transform
from transformers import TimmWrapperImageProcessor
from pipeline.export.hub.write import timm_pixels

def pixels(tensor):
    return (tensor * 255).round().permute(1, 2, 0).numpy().astype(np.uint8)

files = [Path(name) for name in json.loads(sys.stdin.read())]
for size, chosen in ((224, files), (384, files[::25]), (640, files[::50])):
    preprocessing = Preprocessing(size, "published")
    settings = {**timm_pixels(preprocessing), "mean": (0, 0, 0), "std": (1, 1, 1)}
    transform = create_transform(**settings, is_training=False)
    processor = TimmWrapperImageProcessor(pretrained_cfg=settings, architecture="revcol")
    prepare = preprocessing.transform()
    out = np.empty((size, size, 3), dtype=np.uint8)
    for path in chosen:
        prepare(memoryview(path.read_bytes()), out)
        image = Image.open(path).convert("RGB")
        assert np.array_equal(out, pixels(transform(image))), f"timm, {size}: {path}"
        processed = processor(image, return_tensors="pt").pixel_values[0]
        assert np.array_equal(out, pixels(processed)), f"transformers, {size}: {path}"
    print(size, len(chosen))
"""


@pytest.mark.slow
@pytest.mark.shared
def test_sample_photographs_equal_those_of_timm_and_transformers(shared: Path) -> None:
    files = sorted(map(str, (shared / "data" / "imagenet_sample").glob("*/*.JPEG")))
    done = subprocess.run(
        [sys.executable, "-c", COMPARED],
        input=json.dumps(files),
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["224 500", "384 20", "640 10"]
