"""Damages image files of all formats and lets preparation judge them; a fuzz test with a seed.

    python -m tests.prepare.damaged_files --count 20000 --seed 0

Prints counts by format and verdict. A failure names the seed and the number of its file, which
``--first N --count 1`` repeats.
"""

from __future__ import annotations

import argparse
import gzip
import io
import random
import sys
from collections import Counter

import cv2
import numpy as np
from PIL import Image as Pillow
from PIL import features

from pipeline.config.schema import DatasetConfig
from pipeline.data.decode import decode_jpeg
from pipeline.prepare.clean import CleanImage, clean
from pipeline.sources.inspection import short_side_of
from pipeline.sources.member import Rejection
from tests.data.small_datasets import jpeg, picture

CONFIG = DatasetConfig(root="x", min_side=8, max_pixels=4_000_000, exif_orientation="apply")


def _saved(form: str, mode: str = "RGB", **options: object) -> bytes:
    out = io.BytesIO()
    image = Pillow.fromarray(picture(7, 56, 44)).convert(mode)
    image.save(out, form, **options)  # type: ignore[arg-type]
    return out.getvalue()


def sound_files() -> dict[str, bytes]:
    """An undamaged file of every format."""
    exif = Pillow.Exif()
    exif[0x0112] = 6
    deep = picture(7, 56, 44).astype(np.uint16) * 200
    files = {
        "jpeg": jpeg(3, 56, 44),
        "progressive": _saved("JPEG", progressive=True),
        "exif": _saved("JPEG", exif=exif.tobytes()),
        "cmyk": _saved("JPEG", "CMYK"),
        "png": _saved("PNG"),
        "palette": _saved("PNG", "P"),
        "png16": bytes(cv2.imencode(".png", deep)[1]),
        "gif": _saved("GIF", "P"),
        "bmp": _saved("BMP"),
        "tiff": _saved("TIFF"),
        "tiff-lzw": _saved("TIFF", "RGBA", compression="tiff_lzw"),
        "tiff-float": bytes(cv2.imencode(".tiff", deep.astype(np.float32) / 65535)[1]),
        "webp": _saved("WEBP"),
        "jp2": _saved("JPEG2000"),
        "ppm": _saved("PPM"),
        "ico": _saved("ICO"),
        "gzip": gzip.compress(jpeg(3, 56, 44)),
    }
    if features.check("avif"):
        files["avif"] = _saved("AVIF")
    return files


def damaged(data: bytes, choices: random.Random) -> bytes:
    """The file cut, with flipped bits, overwritten or doubled stretches."""
    kind = choices.randrange(5)
    changed = bytearray(data)
    if kind == 0:
        return data[: choices.randrange(len(data))]
    if kind == 1:  # mostly in the header, where decoders are most easily misled
        for _ in range(1 + choices.randrange(4)):
            changed[choices.randrange(min(len(data), 400))] ^= 1 << choices.randrange(8)
    elif kind == 2:
        for _ in range(1 + choices.randrange(8)):
            changed[choices.randrange(len(data))] = choices.randrange(256)
    elif kind == 3:
        start = choices.randrange(len(data))
        changed[start : start + choices.randrange(64)] = choices.randbytes(choices.randrange(64))
    else:
        start = choices.randrange(len(data))
        stretch = data[start : start + choices.randrange(200)]
        place = choices.randrange(len(data))
        changed[place:place] = stretch
    return bytes(changed)


def judge(data: bytes) -> str:
    """What preparation makes of a file: '' if it is kept, else the reason.

    Raises AssertionError if a kept file cannot be decoded, or a rejected one has no reason.
    """
    short_side_of(data)  # the look at a source must survive the same files
    result = clean(data, "a/photo.jpg", CONFIG)
    if isinstance(result, CleanImage):
        pixels = decode_jpeg(result.data)
        assert pixels.shape == (result.height, result.width, 3), "kept with another size"
        assert np.isfinite(result.moments).all(), "moments are not finite"
        return ""
    assert isinstance(result, Rejection)
    assert result.reason, "rejected without a reason"
    assert result.detail, f"rejected as {result.reason} without a detail"
    return result.reason


def fuzz(seed: int, count: int, first: int = 0) -> Counter[tuple[str, str]]:
    """Judge ``count`` damaged files. Returns counts by format and reason ('' for kept)."""
    sound = sorted(sound_files().items())
    verdicts: Counter[tuple[str, str]] = Counter()
    for number in range(first, first + count):
        choices = random.Random(seed * 1_000_003 + number)
        form, data = sound[number % len(sound)]
        try:
            verdicts[form, judge(damaged(data, choices))] += 1
        except Exception as error:
            raise AssertionError(f"seed {seed}, file {number} ({form}): {error!r}") from error
    return verdicts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--count", type=int, default=20_000)
    options = parser.parse_args()
    verdicts = fuzz(options.seed, options.count, options.first)
    for (form, reason), number in sorted(verdicts.items()):
        print(f"{form:12} {reason or 'kept':16} {number}")
    kept = sum(number for (_, reason), number in verdicts.items() if not reason)
    print(f"{verdicts.total()} files, seed {options.seed}: {kept} kept, none undecodable")


if __name__ == "__main__":
    sys.exit(main())
