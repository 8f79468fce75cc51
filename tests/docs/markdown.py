"""Reads the documents of the repository: code blocks, links and names in backticks."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "CHANGELOG.md",
    *sorted((ROOT / "docs").glob("*.md")),
]
FENCE = re.compile(r"^```([^\n]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True, kw_only=True)
class Block:
    """A fenced code block; ``line`` is that of its first line of code."""

    document: Path
    line: int
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.document.relative_to(ROOT)}:{self.line}"


def blocks(*languages: str) -> list[Block]:
    """Code blocks of all documents in these languages, or every block."""
    return [
        Block(
            document=document,
            line=text.count("\n", 0, match.start()) + 2,
            language=match[1].strip(),
            text=match[2],
        )
        for document in DOCUMENTS
        for text in [document.read_text(encoding="utf-8")]
        for match in FENCE.finditer(text)
        if not languages or match[1].strip() in languages
    ]


def commands(block: Block) -> Iterator[list[str]]:
    """The words of each command of a shell block. Comments are left out, continued lines joined."""
    for line in block.text.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        if words:
            yield words


def prose(document: Path) -> str:
    """A document without its code blocks."""
    return FENCE.sub("", document.read_text(encoding="utf-8"))


def in_backticks(document: Path) -> set[str]:
    """What the prose of a document sets in backticks."""
    return set(re.findall(r"`([^`\n]+)`", prose(document)))


def links(document: Path) -> set[str]:
    """Targets of the links and pictures of a document."""
    return set(re.findall(r"\]\(([^)\s]+)\)", prose(document)))
