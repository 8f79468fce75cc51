"""What a layout of a source consists of: how to recognise it, survey it and read it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from pipeline.sources.member import Member
from pipeline.sources.remote import Entry, Storage
from pipeline.sources.source_config import SourceConfig
from pipeline.sources.units import Part, Survey

Entries = Mapping[str, Entry]  # of a folder, by name


@dataclass(frozen=True, kw_only=True)
class Layout:
    """One layout. ``layouts/<name>.py`` defines it as ``LAYOUT``.

    ``order``: position in the detection by ``layout: auto``, from the most specific layout (1) to
    the least: ImageNet's archives are tars as well. ``read``: only for a layout whose parts are
    neither byte ranges of tars nor files of folders; such parts have the layout's name as ``kind``.
    """

    order: int
    # (storage, root, configuration, visible entries of the root) -> True if the source has this
    # layout.
    detect: Callable[[Storage, str, SourceConfig, Entries], bool]
    # (storage, root, configuration) -> the source in units of work. Raises DataError.
    survey: Callable[[Storage, str, SourceConfig], Survey]
    # (part, configuration, label by class id) -> the files of a part.
    read: Callable[[Part, SourceConfig, Mapping[str, int]], Iterator[Member]] | None = None
    # root -> the names for the key `splits`; only for a layout whose splits are no folders.
    split_names: Callable[[str], list[str]] | None = None
    is_folder: bool = True  # the root is a folder that can be listed, not a name elsewhere
