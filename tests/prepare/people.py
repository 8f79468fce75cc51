"""Writes folders as people have them, with images that differ from each other."""

from __future__ import annotations

from pathlib import Path

from tests.data.small_datasets import jpeg


class Album:
    """Writes different JPEGs of 40 x 32 pixels, and remembers nothing but how many."""

    def __init__(self) -> None:
        self.written = 0

    def image(self) -> bytes:
        self.written += 1
        return jpeg(self.written, 40, 32)

    def fill(self, folder: Path, count: int, ending: str = ".jpg") -> Path:
        """Write ``count`` images into a folder."""
        folder.mkdir(parents=True, exist_ok=True)
        for _ in range(count):
            data = self.image()
            (folder / f"p{self.written}{ending}").write_bytes(data)
        return folder

    def splits(self, root: Path, counts: dict[str, int], classes: tuple[str, ...]) -> Path:
        """Write folders of splits, each with ``counts[split]`` images in each of the classes."""
        for split, count in counts.items():
            for name in classes:
                self.fill(root / split / name, count)
        return root


def write(path: Path, data: bytes = b"x") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
