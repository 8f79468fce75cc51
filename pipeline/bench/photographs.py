"""Images for the data benchmarks: photographs where they lie beside the checkout, else made-up ones of their size."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import simplejpeg

from pipeline.files import atomic
from pipeline.sources.class_lists import class_list
from pipeline.synthetic.drawing import picture

SAMPLE = (
    Path(__file__).resolve().parents[3] / "shared" / "data" / "imagenet_sample"
)  # <class>/<image>.JPEG
MADE_UP_CLASSES, MADE_UP_SIDES, MADE_UP_QUALITY = (
    50,
    (370, 660),
    96,
)  # about 500 x 375 pixels and 110 kB, as ImageNet's are


@dataclass(frozen=True)
class Photograph:
    """A JPEG file of a class."""

    wnid: str
    data: bytes


def photographs(count: int, sample: Path = SAMPLE) -> list[Photograph]:
    """``count`` photographs of ``sample`` (fewer if it has fewer), or as many made-up ones where it is not there."""
    paths = sorted(sample.glob("*/*.JPEG"))[:count]
    return [Photograph(path.parent.name, path.read_bytes()) for path in paths] or list(
        _made_up(count)
    )


def _made_up(count: int) -> Iterator[Photograph]:
    classes = class_list("imagenet1k")[:MADE_UP_CLASSES]
    for number in range(count):
        wnid = classes[number % len(classes)]
        pixels = picture(0, wnid, "train", number, MADE_UP_SIDES)
        yield Photograph(wnid, bytes(simplejpeg.encode_jpeg(pixels, MADE_UP_QUALITY, "RGB", "420")))


def write_class_tars(images: Sequence[Photograph], target: Path, copies: int = 1) -> None:
    """A source for the preparation: ``train/<class>.tar``, and the last image as ``val``, since a source has both.

    With ``copies`` each image comes again in other classes, where it is no duplicate.
    """
    *train, held_out = images
    _write_tar(target / "val" / f"{held_out.wnid}.tar", held_out.wnid, [held_out.data])
    classes = sorted({image.wnid for image in train})
    contents: dict[str, list[bytes]] = {wnid: [] for wnid in classes}
    for image in train:
        first = classes.index(image.wnid)
        for copy in range(copies):
            contents[classes[(first + copy * (len(classes) // copies)) % len(classes)]].append(
                image.data
            )
    for wnid, files in contents.items():
        _write_tar(target / "train" / f"{wnid}.tar", wnid, files)


def _write_tar(path: Path, wnid: str, files: Sequence[bytes]) -> None:
    with (
        atomic(path) as file,
        tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar,
    ):
        for number, data in enumerate(files):
            member = tarfile.TarInfo(f"{wnid}_{number}.JPEG")
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
