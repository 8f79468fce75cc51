"""One file of a source after cleaning."""

from __future__ import annotations

from dataclasses import dataclass

from pipeline.prepare.clean import CleanImage
from pipeline.sources.member import Rejection


@dataclass(frozen=True, kw_only=True)
class CleanedMember:
    """A file and what cleaning made of it.

    ``key``: as text that JSON and Parquet can hold. ``key_hash``: xxh3-64 of the key's own bytes
    (with the seed), which decides the order of the dataset. ``data``: the file, for the quarantine.
    """

    key: str
    key_hash: int
    label: int
    data: bytes
    result: CleanImage | Rejection
