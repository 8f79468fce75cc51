"""The settings of a source that this room needs. The job schema's ``DatasetConfig`` has them all.

A protocol, because the schema's room imports this one.
"""

from __future__ import annotations

from typing import Literal, Protocol


class SplitNames(Protocol):
    """Folders relative to the root, or names of splits; '' for a split that is not named."""

    @property
    def train(self) -> str: ...
    @property
    def validation(self) -> str: ...
    @property
    def test(self) -> str: ...


# The key ``splits``. None: divided by the usual names; "none": such folders are classes.
SplitsSetting = SplitNames | Literal["none"] | None


class SourceConfig(Protocol):
    """A source as the user configured it."""

    @property
    def root(self) -> str:
        """Folder or URL."""

    @property
    def layout(self) -> str:
        """class_tars, imagenet_tars, class_folders, huggingface or auto."""

    @property
    def splits(self) -> SplitsSetting:
        """What the source is divided into."""

    @property
    def classes(self) -> str:
        """Name or file of a class list, or auto."""

    @property
    def image_column(self) -> str:
        """Column of the images in a Hugging Face dataset."""

    @property
    def label_column(self) -> str:
        """Column of the labels in a Hugging Face dataset."""
