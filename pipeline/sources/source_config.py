"""The settings of a source that this room needs. The job schema's ``DatasetConfig`` has them all.

A protocol, because the schema's room imports this one.
"""

from __future__ import annotations

from typing import Protocol


class SourceConfig(Protocol):
    """A source as the user configured it."""

    @property
    def root(self) -> str:
        """Folder or URL."""

    @property
    def layout(self) -> str:
        """class_tars, imagenet_tars, class_folders, huggingface or auto."""

    @property
    def classes(self) -> str:
        """Name or file of a class list, or auto."""

    @property
    def image_column(self) -> str:
        """Column of the images in a Hugging Face dataset."""

    @property
    def label_column(self) -> str:
        """Column of the labels in a Hugging Face dataset."""
