"""Made-up images in the layout of the real set, with a sprinkling of the dirt that it has.

Each tar (or folder) is a piece that any process can make, whatever the others do: `pieces`, then `make` each, then `finish`.
"""

from __future__ import annotations

import gzip
import io
import os
import shutil
import tarfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import cv2
import numpy as np
import simplejpeg

from pipeline.config.schema import DatasetConfig, SyntheticConfig
from pipeline.data.decode import Image
from pipeline.data.hashing import key_of
from pipeline.errors import ConfigError
from pipeline.files import atomic, fsync_dir, write_text
from pipeline.sources.class_lists import class_list
from pipeline.sources.imagenet import OUTER_TRAIN, OUTER_VALIDATION, SYNSET_LABELS
from pipeline.synthetic.drawing import picture

AUTO_CLASSES = "fall11_21841"  # where classes are drawn from if the job names no list
MEMBER, FLAT_MEMBER = "{wnid}_{number}.JPEG", "ILSVRC2012_val_{number:08d}.JPEG"
FLAT_PIECE = 500  # images a piece of the flat validation tar
PARTS = ".parts"
KINDS = (
    "truncated",  # the second half of a JPEG is missing
    "empty",
    "text",  # a web page where an image should be
    "duplicate",  # the bytes of another image of the class
    "validation_duplicate",  # the bytes of a validation image
    "png",  # with the name of a JPEG, like the next six
    "cmyk",
    "grey",
    "deep",  # PNG of 16 bits a channel
    "gzip",
    "small",  # below the dataset's min_side
    "stray",  # what operating systems leave in folders
)
_TEXT = b"<html><head><title>404 Not Found</title></head><body>This photo is no longer available.</body></html>\n"


@dataclass(frozen=True)
class SyntheticFile:
    """One tar or folder to make: images ``first``, ``first`` + 1, ... of a split, one for each of ``wnids``, then dirt."""

    path: Path  # a tar where it ends in .tar, else a folder
    within: Path | None  # the file that takes the piece up in the end
    seed: int
    sizes: tuple[int, int]  # least and largest side (pixels)
    split: str
    member: str  # form of the members' names
    wnids: tuple[str, ...]
    first: int
    dirt: tuple[str, ...] = ()  # kinds
    too_small: int = 1  # side of an image that is too small (pixels)
    validation: int = 0  # number of the validation image that a duplicate copies


def pieces(config: DatasetConfig, target: Path) -> list[SyntheticFile]:
    """What is to be made for a dataset below ``target``, in a fixed order. Makes nothing.

    Raises:
        ConfigError: more classes are wanted than the class list has.
    """
    made_up, wnids = _settings(config), _classes(config)
    tars, nested = config.layout != "class_folders", config.layout == "imagenet_tars"
    dirt = _dirt(made_up)
    turns = {wnid: number for number, wnid in enumerate(_flat_order(config), 1)}

    def piece(split: str, wnid: str, count: int, number: int) -> SyntheticFile:
        folder = target / PARTS / split if nested else target / split
        return SyntheticFile(
            path=folder / (f"{wnid}.tar" if tars else wnid),
            within=target / OUTER_TRAIN if nested else None,
            seed=made_up.seed,
            sizes=(made_up.min_size, made_up.max_size),
            split=split,
            member=MEMBER,
            wnids=(wnid,) * count,
            first=0,
            dirt=tuple(dirt[number]) if split == "train" else (),
            too_small=max(1, min(config.min_side, made_up.min_size) // 2),
            validation=turns[wnid] if nested else 0,
        )

    train = [
        piece("train", wnid, made_up.images_per_class, number) for number, wnid in enumerate(wnids)
    ]
    if nested:
        return train + list(_flat_validation(config, target))
    return train + [
        piece("val", wnid, made_up.validation_per_class, number)
        for number, wnid in enumerate(wnids)
    ]


def make(piece: SyntheticFile) -> None:
    """Make a piece unless it is there: the same bytes whoever makes it and whenever; complete, or not at all."""
    if piece.path.exists() or (piece.within is not None and piece.within.exists()):
        return
    if piece.path.suffix == ".tar":
        with atomic(piece.path) as file:
            _write_tar(file, _members(piece))
    else:
        _write_folder(piece.path, _members(piece))


def finish(config: DatasetConfig, target: Path) -> None:
    """What needs all pieces: synsets.txt where the job names no class list, and the outer tars of ``imagenet_tars``."""
    if config.classes == "auto":
        write_text(target / "synsets.txt", "".join(f"{wnid}\n" for wnid in _classes(config)))
    if config.layout == "imagenet_tars":
        _finish_imagenet(config, target)
    for left in (*target.glob(".*.tmp"), *target.glob("*/.*.tmp")):  # by killed processes
        shutil.rmtree(left) if left.is_dir() else left.unlink(missing_ok=True)


def dirt_kinds(config: DatasetConfig) -> dict[str, int]:
    """How many bad files of each kind are put into the training split."""
    return dict(Counter(kind for kinds in _dirt(_settings(config)) for kind in kinds))


def _settings(config: DatasetConfig) -> SyntheticConfig:
    if config.synthetic is None:
        raise ConfigError("nothing is to be generated", place="data", remedy="give `synthetic`")
    return config.synthetic


def _classes(config: DatasetConfig) -> list[str]:
    """The classes that have images, drawn by the seed, in the order of the list."""
    made_up = _settings(config)
    name = AUTO_CLASSES if config.classes == "auto" else config.classes
    listed = class_list(name)
    if made_up.classes > len(listed):
        cause = f"{made_up.classes} classes are to be generated, the list {name} has {len(listed)}"
        raise ConfigError(cause, place="synthetic.classes", remedy=f"take at most {len(listed)}")
    drawn = _random("classes", made_up.seed).choice(len(listed), made_up.classes, replace=False)
    return [listed[index] for index in sorted(drawn.tolist())]


def _random(purpose: str, seed: int) -> np.random.Generator:
    return np.random.default_rng(key_of(purpose, seed))


def _dirt(made_up: SyntheticConfig) -> list[list[str]]:
    """Kinds of dirt by class: as many files as the share says (one at least), kinds in turn, evenly over the classes."""
    count = (
        max(1, round(made_up.corrupt_fraction * made_up.classes * made_up.images_per_class))
        if made_up.corrupt_fraction
        else 0
    )
    places = _random("dirt", made_up.seed).permutation(count) % made_up.classes
    kinds: list[list[str]] = [[] for _ in range(made_up.classes)]
    for number, place in enumerate(places.tolist()):
        kinds[place].append(KINDS[number % len(KINDS)])
    return kinds


def _members(piece: SyntheticFile) -> Iterator[tuple[str, bytes]]:
    """Names and contents of a piece's files, one in memory at a time."""
    for number, wnid in enumerate(piece.wnids, piece.first):
        yield piece.member.format(wnid=wnid, number=number), _image(piece, wnid, number)
    for turn, kind in enumerate(piece.dirt):
        wnid, number = piece.wnids[0], piece.first + len(piece.wnids) + turn
        name = piece.member.format(wnid=wnid, number=number)
        if kind == "stray":
            name = ".DS_Store" if piece.dirt.index(kind) == turn else f"._{name}"
        yield name, _bad(piece, kind, wnid, number)


def _image(piece: SyntheticFile, wnid: str, number: int, split: str = "") -> bytes:
    split = split or piece.split
    quality = 70 + key_of("quality", piece.seed, wnid, split, number) % 27
    return _jpeg(picture(piece.seed, wnid, split, number, piece.sizes), quality)


def _jpeg(image: Image, quality: int, colours: str = "RGB", subsampling: str = "420") -> bytes:
    return bytes(simplejpeg.encode_jpeg(image, quality, colours, subsampling))


def _bad(piece: SyntheticFile, kind: str, wnid: str, number: int) -> bytes:
    """The content of a file of a kind of dirt; images among them are of the class, and in no other file unless duplicates."""
    copied = key_of("duplicate", piece.seed, wnid, number) % len(piece.wnids)
    match kind:
        case "empty":
            return b""
        case "text":
            return _TEXT
        case "stray":
            return b"\x00\x00\x00\x01Bud1" + bytes(56)
        case "duplicate":
            return _image(piece, wnid, piece.first + copied)
        case "validation_duplicate":
            return _image(piece, wnid, piece.validation, "val")
        case "truncated":
            whole = _image(piece, wnid, number)
            return whole[: len(whole) // 2]
        case "gzip":
            return gzip.compress(_image(piece, wnid, number), mtime=0)
    return _odd(picture(piece.seed, wnid, piece.split, number, piece.sizes), kind, piece.too_small)


def _odd(image: Image, kind: str, too_small: int) -> bytes:
    """An image in another form than the usual."""
    match kind:
        case "png":
            return cv2.imencode(".png", image[..., ::-1])[1].tobytes()
        case "deep":
            return cv2.imencode(".png", image[..., ::-1].astype(np.uint16) * 257)[1].tobytes()
        case "grey":
            return _jpeg(
                np.asarray(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)[..., None], np.uint8),
                90,
                "GRAY",
                "Gray",
            )
        case (
            "cmyk"
        ):  # stored inverted, as Adobe's programs do: the inks' complements are red, green and blue
            return _jpeg(np.dstack([image, np.full_like(image[..., 0], 255)]), 90, "CMYK", "444")
        case "small":
            return _jpeg(np.asarray(cv2.resize(image, (too_small, too_small)), np.uint8), 90)
    raise ValueError(f"no kind of dirt: {kind}")


def _write_tar(file: IO[bytes], members: Iterable[tuple[str, bytes]]) -> None:
    with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for name, data in members:
            tar.addfile(_header(name, len(data)), io.BytesIO(data))


def _header(name: str, size: int) -> tarfile.TarInfo:
    """A header that says nothing of when, where and by whom the tar was made (TarInfo's own defaults)."""
    header = tarfile.TarInfo(name)
    header.size = size
    return header


def _write_folder(path: Path, members: Iterable[tuple[str, bytes]]) -> None:
    """A folder of files that appears complete, or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.mkdir(parents=True)
    try:
        for name, data in members:
            with open(temporary / name, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
        fsync_dir(temporary)
        os.replace(temporary, path)
        fsync_dir(path.parent)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _flat_order(config: DatasetConfig) -> list[str]:
    """The classes in the order in which they take turns in the flat validation tar."""
    wnids = _classes(config)
    return [
        wnids[index]
        for index in _random("validation", _settings(config).seed).permutation(len(wnids)).tolist()
    ]


def _flat_labels(config: DatasetConfig) -> list[str]:
    """The class of each validation image of ``imagenet_tars``, in the order of their names."""
    return _flat_order(config) * _settings(config).validation_per_class


def _flat_validation(config: DatasetConfig, target: Path) -> Iterator[SyntheticFile]:
    made_up, labels = _settings(config), _flat_labels(config)
    for start in range(0, len(labels), FLAT_PIECE):
        yield SyntheticFile(
            path=target / PARTS / "val" / f"{start:08d}.tar",
            within=target / OUTER_VALIDATION,
            seed=made_up.seed,
            sizes=(made_up.min_size, made_up.max_size),
            split="val",
            member=FLAT_MEMBER,
            wnids=tuple(labels[start : start + FLAT_PIECE]),
            first=start + 1,
        )


def _finish_imagenet(config: DatasetConfig, target: Path) -> None:
    """The tar of training tars, the flat validation tar and its labels; the pieces go when all of it is there."""
    parts: dict[Path, list[Path]] = {}
    for piece in pieces(config, target):
        if piece.within is not None:
            parts.setdefault(piece.within, []).append(piece.path)
    for outer, inner in parts.items():
        if not outer.exists():
            with atomic(outer) as file:
                (_nest if outer.name == OUTER_TRAIN else _join)(file, inner)
    write_text(target / SYNSET_LABELS, "".join(f"{wnid}\n" for wnid in _flat_labels(config)))
    shutil.rmtree(target / PARTS, ignore_errors=True)


def _nest(file: IO[bytes], tars: Sequence[Path]) -> None:
    """A tar of tars."""
    with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as outer:
        for path in tars:
            with open(path, "rb") as inner:
                outer.addfile(_header(path.name, path.stat().st_size), inner)


def _join(file: IO[bytes], tars: Sequence[Path]) -> None:
    """One tar of the members of several."""
    with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as outer:
        for path in tars:
            with tarfile.open(path) as inner:
                for member in inner:
                    outer.addfile(member, inner.extractfile(member))
