"""Notices a source that changed in place: other bytes under the same names and of the same size.

The fingerprint of a dataset has names and sizes of the source, which the survey knows. Only if the
times in the source differ from those at the preparation are its files read again and compared by a
digest. So a copy of a source, whose times are others, is the same source.

    times            content          the prepared dataset is
    as before        (not read)       up to date
    others           as before        up to date: a copy, or a backup that was restored
    others           others           out of date
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import xxhash

from pipeline.files import json_digest, write_text
from pipeline.layout import SOURCE_TIMES
from pipeline.prepare.context import BuildContext
from pipeline.sources.digest import source_digest


def add_content(digest: xxhash.xxh3_128, key: str, data: bytes) -> None:
    """Add a file to the digest of a unit."""
    # With the length, so that bytes cannot move from one file to the next unnoticed.
    digest.update(f"{key}\0{len(data)}\0".encode())
    digest.update(data)


def content_of(unit_digests: Iterable[str]) -> str:
    """The digest of a source from those of its units, in their order; '' if one is unknown."""
    digests = list(unit_digests)
    return json_digest(digests) if all(digests) else ""


def times_of(target: Path) -> str:
    """The times of the source at the preparation; '' for a dataset of an earlier version."""
    try:
        return (target / SOURCE_TIMES).read_text()
    except FileNotFoundError:
        return ""


def keep_times(context: BuildContext) -> None:
    """Record the times of the source beside the dataset."""
    write_text(context.target / SOURCE_TIMES, source_digest(context.config) or "")
