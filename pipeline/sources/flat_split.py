"""A split whose images lie together in one folder, with their labels in a file."""

from __future__ import annotations

import posixpath
from collections.abc import Mapping

from pipeline.sources.folder_files import folder_files, require_access
from pipeline.sources.names import may_be_image
from pipeline.sources.remote import Storage
from pipeline.sources.units import UNIT_FILES, Part
from pipeline.sources.validation_labels import labels_of

NO_LABEL = -1  # of a file that is no image


def flat_parts(
    storage: Storage, folder: str, labels_path: str, label_of: Mapping[str, int]
) -> list[Part]:
    """The parts of a folder, each with the class index of its files.

    Raises:
        DataError: an image has no label, or one that is no class of the dataset.
    """
    listing = folder_files(storage, folder, check_access=True)
    require_access(listing.refused)
    stems = {
        path: posixpath.basename(path).partition(".")[0]
        for path, _ in listing.files
        if may_be_image(path.removeprefix(folder).lstrip("/"))
    }
    labels = dict(
        zip(stems, labels_of(storage, labels_path, list(stems.values()), label_of), strict=True)
    )
    parts: list[Part] = []
    for first in range(0, len(listing.files), UNIT_FILES):
        files = listing.files[first : first + UNIT_FILES]
        parts.append(
            Part(
                kind="folder",
                path=folder,
                first=first,
                last=first + len(files),
                group=posixpath.basename(folder),
                labels=tuple(labels.get(path, NO_LABEL) for path, _ in files),
                size=sum(max(size or 0, 0) for _, size in files),
                images=sum(path in labels for path, _ in files),
            )
        )
    return parts
