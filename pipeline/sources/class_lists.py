"""Lists of classes: WordNet IDs in the order of a model's outputs, and their readable names."""

from __future__ import annotations

import functools
from pathlib import Path

from pipeline.errors import ConfigError
from pipeline.shipped import CONFIGS
from pipeline.suggest import did_you_mean

FOLDER = CONFIGS / "classes"
NAMES = FOLDER / "names.txt"


def class_list(name_or_path: str) -> list[str]:
    """The classes of a shipped list, or of a file of one class a line ('#' starts a comment line; the first word counts).

    Raises ConfigError where there is no such list, or it is empty or names a class twice.
    """
    return list(_read(find(name_or_path)))


def find(name_or_path: str, beside: Path | None = None) -> Path:
    """The file of a class list: of ``beside``/configs/classes, of the shipped ones, or a path. Raises ConfigError."""
    places = [FOLDER / f"{name_or_path}.txt", Path(name_or_path)]
    if beside is not None:
        places.insert(0, beside / "configs" / "classes" / f"{name_or_path}.txt")
    found = next((place for place in places if place.is_file()), None)
    if found is None:
        shipped = [path.stem for path in FOLDER.glob("*.txt") if path != NAMES]
        remedy = did_you_mean(name_or_path, [*shipped, "auto"], "shipped lists")
        raise ConfigError(f"no class list '{name_or_path}'", place="classes", remedy=remedy)
    return found


@functools.lru_cache(maxsize=8)
def _read(path: Path) -> tuple[str, ...]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"cannot be read as a class list: {error}", place=str(path), remedy="one class a line"
        ) from None
    seen: dict[str, int] = {}
    for number, line in enumerate(lines, 1):
        words = line.split()
        if not words or words[0].startswith("#"):
            continue
        if words[0] in seen:
            cause = f"the class {words[0]} is listed twice (first in line {seen[words[0]]})"
            raise ConfigError(cause, place=f"{path}:{number}", remedy="take one of them away")
        seen[words[0]] = number
    if not seen:
        raise ConfigError("names no class", place=str(path), remedy="one class a line")
    return tuple(seen)


@functools.lru_cache(maxsize=1)
def class_names() -> dict[str, str]:
    """Readable names by WordNet ID, as far as known (21,844 IDs of ImageNet)."""
    lines = NAMES.read_text(encoding="utf-8").splitlines()
    return dict(line.split("\t", 1) for line in lines if "\t" in line)
