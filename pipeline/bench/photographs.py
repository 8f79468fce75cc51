"""Images for the data benchmarks: ImageNet photographs if they are there, else synthetic ones."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import simplejpeg

from pipeline.files import atomic
from pipeline.sources.class_lists import class_list
from pipeline.synthetic.drawing import draw_image

# <class>/<image>.JPEG, in the folder `shared` beside the checkout
SAMPLE = Path(__file__).resolve().parents[3] / "shared" / "data" / "imagenet_sample"
# Synthetic images have ImageNet's typical size: about 500 x 375 pixels and 110 kB.
SYNTHETIC_CLASSES = 50
SYNTHETIC_SIDES = (370, 660)  # pixels
SYNTHETIC_QUALITY = 96


@dataclass(frozen=True)
class Photograph:
    """A JPEG file and the WordNet ID of its class."""

    wnid: str
    data: bytes


def photographs(count: int, sample: Path = SAMPLE) -> list[Photograph]:
    """``count`` photographs from ``sample``, or fewer if it has fewer.

    If it has none, ``count`` synthetic images.
    """
    paths = sorted(sample.glob("*/*.JPEG"))[:count]
    if not paths:
        return list(_synthetic(count))
    return [Photograph(path.parent.name, path.read_bytes()) for path in paths]


def _synthetic(count: int) -> Iterator[Photograph]:
    classes = class_list("imagenet1k")[:SYNTHETIC_CLASSES]
    for number in range(count):
        wnid = classes[number % len(classes)]
        pixels = draw_image(0, wnid, "train", number, SYNTHETIC_SIDES)
        data = simplejpeg.encode_jpeg(pixels, SYNTHETIC_QUALITY, "RGB", "420")
        yield Photograph(wnid, bytes(data))


def write_class_tars(images: Sequence[Photograph], target: Path, copies: int = 1) -> None:
    """Write a source for the preparation: ``train/<class>.tar`` and ``val/<class>.tar``.

    The last image is the validation split, because a source must have both, under the name of a
    training class.

    Args:
        copies: number of classes that contain each training image. A benchmark of few photographs
            gets more work this way: the preparation drops duplicates within a class only.
    """
    *train, held_out = images
    classes = sorted({image.wnid for image in train})
    _write_tar(target / "val" / f"{classes[0]}.tar", classes[0], [held_out.data])
    files: dict[str, list[bytes]] = {wnid: [] for wnid in classes}
    # Spread the copies evenly. Example: 6 classes, 2 copies: an image of class 4 is in 4 and in
    # (4 + 3) % 6 = 1.
    stride = len(classes) // copies
    for image in train:
        first = classes.index(image.wnid)
        for copy in range(copies):
            files[classes[(first + copy * stride) % len(classes)]].append(image.data)
    for wnid, contents in files.items():
        _write_tar(target / "train" / f"{wnid}.tar", wnid, contents)


def _write_tar(path: Path, wnid: str, contents: Sequence[bytes]) -> None:
    with (
        atomic(path) as file,
        tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar,
    ):
        for number, data in enumerate(contents):
            member = tarfile.TarInfo(f"{wnid}_{number}.JPEG")
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
