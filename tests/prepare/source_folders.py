"""Small image sources in every layout, and preparation without Ray."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.config.schema import DatasetConfig
from pipeline.layout import SOURCE_TIMES
from pipeline.prepare.build import prepare_dataset
from tests.data.small_datasets import jpeg

Files = Mapping[str, bytes]


def serial(function: Callable[[Any], Any], items: Sequence[Any]) -> Iterator[tuple[Any, Any]]:
    """Run the tasks in this process, in order."""
    for item in items:
        yield item, function(item)


def backwards(function: Callable[[Any], Any], items: Sequence[Any]) -> Iterator[tuple[Any, Any]]:
    """Run the tasks in reverse order, as if the last worker were the fastest."""
    return serial(function, list(reversed(items)))


def prepare(
    root: Path | str,
    target: Path,
    tasks: Any = serial,
    seed: int = 0,
    notes: list[str] | None = None,
    **settings: Any,
) -> dict[str, float]:
    """Prepare a source. ``notes`` receives the messages for the user."""
    messages = notes if notes is not None else []
    config = DatasetConfig(root=str(root), **{"max_rejected": 1.0, "min_side": 16, **settings})
    return prepare_dataset(
        name="set",
        config=config,
        target=target,
        seed=seed,
        tasks=tasks,
        progress=lambda *_: None,
        log=lambda text, _level: messages.append(text),
    )


def images(label: int, count: int, first: int = 0) -> dict[str, bytes]:
    """Different JPEGs of 40 x 32 pixels by name; ``first`` shifts the content, not the names."""
    return {f"c{label}_{i}.JPEG": jpeg(1000 * label + first + i, 40, 32) for i in range(count)}


def tar_bytes(files: Files) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return out.getvalue()


def write_tar(path: Path, files: Files) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(tar_bytes(files))


def class_tars(root: Path, classes: int = 3, count: int = 20, validation: int = 6) -> Path:
    """Write train/ and val/ folders of class tars; with ``validation`` 0, class tars at the top."""
    for label in range(classes):
        train = root / "train" if validation else root
        write_tar(train / f"c{label}.tar", images(label, count))
        if validation:
            write_tar(root / "val" / f"c{label}.tar", images(label, validation, first=500))
    return root


def class_folders(root: Path, classes: int = 3, count: int = 20) -> Path:
    for label in range(classes):
        folder = root / f"c{label}"
        folder.mkdir(parents=True)
        for name, data in images(label, count).items():
            (folder / name).write_bytes(data)
    return root


def shard_bytes(target: Path) -> dict[str, bytes]:
    """Every file of a prepared dataset, by its path; without the times of its source."""
    return {
        str(path.relative_to(target)): path.read_bytes()
        for path in sorted(target.rglob("*"))
        if path.is_file() and path.name != SOURCE_TIMES
    }
