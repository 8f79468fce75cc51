"""WebDataset shards: tars of KEY.jpg beside KEY.cls, or KEY.json with a label.

    train-000000.tar    000000.jpg  000000.cls  000001.jpg  000001.cls  ...
    train-000001.tar
    val-000000.tar

The shards lie together or in folders of splits. The names in front of their numbers, or the
folders, become splits by the usual names or by the key ``splits``. Only headers and labels are read
here: the images are read as those of any tar, with a label for each.
"""

from __future__ import annotations

import json
import posixpath
import re
import tarfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial

from pipeline.errors import DataError
from pipeline.sources import class_sets, splits
from pipeline.sources.class_order import ordered_classes, visible_entries
from pipeline.sources.class_survey import CONCURRENT_REQUESTS, class_like
from pipeline.sources.flat_split import NO_LABEL
from pipeline.sources.layout import Entries, Layout
from pipeline.sources.names import is_class_tar, is_image
from pipeline.sources.remote import BLOCK, HEADER_BLOCK, Entry, Storage, open_storage
from pipeline.sources.source_config import SourceConfig
from pipeline.sources.tar_names import first_names
from pipeline.sources.units import (
    UNIT_BYTES,
    Part,
    SplitName,
    Survey,
    Unit,
    fingerprint_items,
    pack_units,
)

LABEL_KEYS = ("label", "cls", "class", "class_id", "target", "label_name", "class_name")
_LABEL_FILE = "cls"
_JSON_FILE = "json"
_CAPTIONS = {"txt", "caption", _JSON_FILE}  # beside the images of captioned datasets
_NUMBERED = re.compile(r"(^|[-_.])\d+$")  # train-000000, 00001; not n01440764
_MOST_FOLDERS = 16  # with more of them, they are classes and not splits
_PEEKED = 12  # names of the first shard
_NO_CLASS = ("", "-1", "None", "null")


@dataclass(kw_only=True)
class _Shard:
    """What the scan of a shard gathers: of every file, its offset and its sample's key."""

    path: str
    size: int
    offsets: list[int] = field(default_factory=list)
    keys: list[str] = field(default_factory=list)
    is_image: list[bool] = field(default_factory=list)
    class_of: dict[str, str] = field(default_factory=dict)  # by key

    def unlabelled(self) -> int:
        """Number of images without a label."""
        pairs = zip(self.keys, self.is_image, strict=True)
        return sum(is_image and key not in self.class_of for key, is_image in pairs)

    def images_by_class(self) -> Counter[str]:
        pairs = zip(self.keys, self.is_image, strict=True)
        return Counter(self.class_of[key] for key, is_image in pairs if is_image)


def _detect(storage: Storage, root: str, config: SourceConfig, entries: Entries) -> bool:
    shards = next(iter(_shards_by_split(storage, root, config, entries)[0].values()), [])
    if not shards:
        return False
    first = shards[0]
    kinds: dict[str, set[str]] = {}
    for name in first_names(storage, first["name"], int(first["size"] or 0), _PEEKED):
        key, kind = _key_and_kind(name)
        kinds.setdefault(key, set()).add(kind)
    stem = posixpath.basename(first["name"])[: -len(".tar")]
    # Captions are no labels, but a numbered shard with them is no class tar either: it is refused
    # later, with what it lacks.
    return any(
        any(is_image(f"x.{kind}") for kind in of_key)
        and (_LABEL_FILE in of_key or (bool(of_key & _CAPTIONS) and bool(_NUMBERED.search(stem))))
        for of_key in kinds.values()
    )


def _survey(storage: Storage, root: str, config: SourceConfig) -> Survey:
    by_split, notes = _shards_by_split(storage, root, config, visible_entries(storage, root))
    scanned: dict[SplitName, list[_Shard]] = {}
    with ThreadPoolExecutor(1 if storage.is_local else CONCURRENT_REQUESTS) as pool:
        for split, shards in by_split.items():
            scanned[split] = list(pool.map(partial(_scan, storage), shards))
    _require_labels(storage, root, scanned)
    counts = {
        split: sum((shard.images_by_class() for shard in shards), Counter())
        for split, shards in scanned.items()
    }
    class_sets.require_same(counts, config)
    ids = sorted(sum(counts.values(), Counter()))
    if all(class_id.isdigit() for class_id in ids):
        ids.sort(key=int)  # 2 before 10
    classes = ordered_classes(storage, root, config, ids)
    label_of = {class_id: label for label, (class_id, _) in enumerate(classes)}
    units: list[Unit] = []
    for split, scanned_shards in scanned.items():
        parts = [part for shard in scanned_shards for part in _cut(shard, label_of)]
        units += pack_units(parts, split, len(units))
    return Survey(
        layout="webdataset",
        classes=classes,
        units=units,
        fingerprint_items=fingerprint_items(root, units),
        notes=[*notes, *class_sets.notes(counts)],
    )


def _shards_by_split(
    storage: Storage, root: str, config: SourceConfig, entries: Entries
) -> tuple[dict[SplitName, list[Entry]], list[str]]:
    """The shards of each split in order, and notes for the user."""
    groups = _groups(storage, entries)
    division = splits.divide(config.splits, [name for name, tars in groups.items() if tars])
    # None of the groups is a split: all shards together are the whole source.
    if "" in division.splits.values():
        return {"": [tar for tars in groups.values() for tar in tars]}, []
    unused = sorted(set(groups) - set(division.splits.values()))
    by_split = {split: groups.get(name, []) for split, name in division.splits.items()}
    return by_split, replace(division, unused=unused).notes


def _groups(storage: Storage, entries: Entries) -> dict[str, list[Entry]]:
    """Shards by the name in front of their number, or by their folder."""
    groups: dict[str, list[Entry]] = {}
    for name, entry in entries.items():
        if is_class_tar(name) and entry["type"] == "file":
            groups.setdefault(_NUMBERED.sub("", name[: -len(".tar")]), []).append(entry)
    folders = [] if groups else list(class_like(entries).items())
    for name, entry in folders if len(folders) <= _MOST_FOLDERS else ():
        inside = visible_entries(storage, entry["name"].rstrip("/"))
        groups[name] = [tar for tar_name, tar in inside.items() if is_class_tar(tar_name)]
    return groups


def _split_names(root: str) -> list[str]:
    storage, folder = open_storage(root)
    return list(_groups(storage, visible_entries(storage, folder)))


def _key_and_kind(name: str) -> tuple[str, str]:
    """A file's sample and kind: "a/000001.seg.png" -> ("a/000001", "png")."""
    folder, base = posixpath.split(name)
    key, _, kind = base.partition(".")
    return posixpath.join(folder, key), kind.lower().rpartition(".")[2]


def _scan(storage: Storage, entry: Entry) -> _Shard:
    path = entry["name"]
    shard = _Shard(path=path, size=int(entry["size"] or 0))
    block = HEADER_BLOCK if storage.is_local else BLOCK
    try:
        with (
            storage.open(path, 0, shard.size, block) as file,
            tarfile.open(fileobj=file, mode="r:") as tar,
        ):
            for member in tar:
                # tarfile remembers every member, which would grow with the archive.
                tar.members = []  # type: ignore[attr-defined]
                if not member.isfile():
                    continue
                key, kind = _key_and_kind(member.name)
                shard.offsets.append(member.offset)
                shard.keys.append(key)
                shard.is_image.append(is_image(f"x.{kind}"))
                content = tar.extractfile(member) if kind in (_LABEL_FILE, _JSON_FILE) else None
                class_id = _class_id(content.read(), kind) if content is not None else ""
                # A key may have both files: the first one that names a class counts.
                if class_id not in _NO_CLASS:
                    shard.class_of.setdefault(key, class_id)
    except (tarfile.TarError, EOFError) as error:
        raise DataError(
            f"is damaged: {error}",
            place=storage.shown(path),
            remedy="copy it again, or move it out of the source",
        ) from None
    return shard


def _class_id(content: bytes, kind: str) -> str:
    """The class in a label file; one of _NO_CLASS if it has none."""
    text = content.decode("utf-8", "replace").strip()
    if kind == _LABEL_FILE:
        return text
    try:
        values = json.loads(text)
    except ValueError:
        return ""
    if not isinstance(values, dict):
        return str(values) if isinstance(values, int) else ""
    label = next((values[key] for key in LABEL_KEYS if key in values), None)
    return str(label) if isinstance(label, str | int) else ""


def _require_labels(
    storage: Storage, root: str, scanned: Mapping[SplitName, Sequence[_Shard]]
) -> None:
    """Raise DataError for images without a label, with the counts of each split."""
    lines = []
    for split, shards in scanned.items():
        images = sum(sum(shard.is_image) for shard in shards)
        missing = sum(shard.unlabelled() for shard in shards)
        if missing or not images:
            lines.append(f"{missing} of {images} images of the {split or 'training'} shards")
    if lines:
        raise DataError(
            f"WebDataset shards without labels: {', '.join(lines)} have none",
            place=storage.shown(root),
            remedy=f"add KEY.cls, or KEY.json with one of {', '.join(LABEL_KEYS)}; captions are "
            "no classes",
        )


def _cut(shard: _Shard, label_of: Mapping[str, int]) -> Iterator[Part]:
    """Parts of about UNIT_BYTES, each beginning at a file's header, with a label per file."""
    labels = [
        label_of[shard.class_of[key]] if is_image else NO_LABEL
        for key, is_image in zip(shard.keys, shard.is_image, strict=True)
    ]
    begin = 0
    for number in range(1, len(labels) + 1):
        first = shard.offsets[begin]
        # A part ends where the next file's header begins; the last one at the end of the archive.
        last = shard.offsets[number] if number < len(labels) else shard.size
        if last - first >= UNIT_BYTES or number == len(labels):
            yield Part(
                kind="tar",
                path=shard.path,
                first=first,
                last=last,
                group=posixpath.basename(shard.path)[: -len(".tar")],
                labels=tuple(labels[begin:number]),
                size=last - first,
                images=sum(shard.is_image[begin:number]),
            )
            begin = number


LAYOUT = Layout(order=3, detect=_detect, survey=_survey, split_names=_split_names)
