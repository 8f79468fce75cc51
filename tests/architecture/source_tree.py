"""The repository's own text, for the tests of this folder."""

from __future__ import annotations

import ast
import functools
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "pipeline"


@functools.cache
def tracked(*patterns: str) -> list[Path]:
    """Files that git tracks, or would track, below the root; all of them without a pattern."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "--", *patterns]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    paths = [ROOT / line for line in listed.stdout.splitlines()]
    return [path for path in paths if path.is_file()]


def python_files(*folders: str) -> list[Path]:
    """Python files of folders such as "pipeline"."""
    return [path for path in tracked(*folders) if path.suffix == ".py"]


@functools.cache
def text_of(path: Path) -> str:
    return path.read_text(encoding="utf-8")


@functools.cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(text_of(path))


def shown(path: Path) -> str:
    """A path as a test's name or message shows it."""
    return str(path.relative_to(ROOT))
