"""Class lists: WordNet IDs in the order of a model's outputs, and their readable names."""

from __future__ import annotations

import functools
from pathlib import Path

from pipeline.errors import ConfigError
from pipeline.shipped import CONFIGS
from pipeline.suggest import did_you_mean

FOLDER = CONFIGS / "classes"
NAMES = FOLDER / "names.txt"


def class_list(name_or_path: str) -> list[str]:
    """Read the classes of a shipped list, or of a file with one class per line.

    The first word of a line counts; lines that begin with '#' are comments.

    Raises:
        ConfigError: there is no such list, it is empty, or it lists a class twice.
    """
    return list(_read(find(name_or_path)))


def find(name_or_path: str, beside: Path | None = None) -> Path:
    """Find the file of a class list.

    Looked for in ``beside``/configs/classes, among the shipped lists, and as a path, in this order.

    Raises:
        ConfigError: there is no such list; the remedy suggests a similar name.
    """
    candidates = [FOLDER / f"{name_or_path}.txt", Path(name_or_path)]
    if beside is not None:
        # The user's own folder comes first, so that a list there can replace a shipped one of the
        # same name.
        candidates.insert(0, beside / "configs" / "classes" / f"{name_or_path}.txt")
    path = next((candidate for candidate in candidates if candidate.is_file()), None)
    if path is None:
        shipped = [path.stem for path in FOLDER.glob("*.txt") if path != NAMES]
        remedy = did_you_mean(name_or_path, [*shipped, "auto"], "shipped lists")
        raise ConfigError(f"no class list '{name_or_path}'", place="classes", remedy=remedy)
    return path


@functools.lru_cache(maxsize=8)
def _read(path: Path) -> tuple[str, ...]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"cannot be read as a class list: {error}",
            place=str(path),
            remedy="write one class per line",
        ) from None
    line_of: dict[str, int] = {}  # keeps the order of the file
    for number, line in enumerate(lines, 1):
        words = line.split()
        if not words or words[0].startswith("#"):
            continue
        name = words[0]
        if name in line_of:
            cause = f"the class {name} is listed twice (first in line {line_of[name]})"
            raise ConfigError(cause, place=f"{path}:{number}", remedy="remove one of the two lines")
        line_of[name] = number
    if not line_of:
        raise ConfigError("names no class", place=str(path), remedy="write one class per line")
    return tuple(line_of)


@functools.lru_cache(maxsize=1)
def class_names() -> dict[str, str]:
    """Readable names by WordNet ID (21,844 IDs of ImageNet)."""
    lines = NAMES.read_text(encoding="utf-8").splitlines()
    return dict(line.split("\t", 1) for line in lines if "\t" in line)
