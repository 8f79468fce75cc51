"""Digests of what a prepared dataset, and the work of an unfinished preparation, depend on."""

from __future__ import annotations

from pipeline.config.schema import DatasetConfig
from pipeline.config.schema.rules import keys_that_keep_work
from pipeline.data.shards import FORMAT
from pipeline.files import json_digest
from pipeline.sources.units import Survey

# Where the source lies, and limits that only decide whether preparation may continue. The layout
# and the classes enter as they were found, so that "auto" equals the explicit value.
_NOT_IN_FINGERPRINT = ("root", "layout", "classes", "synthetic", "max_rejected")


def fingerprint(source: Survey, config: DatasetConfig, seed: int) -> str:
    """Digest of everything that the shards' bytes depend on.

    The content of the source counts, not its place: a copy in another folder gives the same
    fingerprint.
    """
    return _digest(source, config, seed, _NOT_IN_FINGERPRINT)


def units_fingerprint(source: Survey, config: DatasetConfig, seed: int) -> str:
    """Digest of everything that makes the units of an unfinished preparation useless if it changes.

    Units keep what they know of each image, so other splits, shards and size limits can still be
    made of them (``Rules.keeps_work``).
    """
    return _digest(source, config, seed, (*_NOT_IN_FINGERPRINT, *keys_that_keep_work(type(config))))


def _digest(source: Survey, config: DatasetConfig, seed: int, without: tuple[str, ...]) -> str:
    settings = {key: value for key, value in config.digest_values().items() if key not in without}
    # Names are for people; the order of the IDs decides the labels.
    class_ids = [class_id for class_id, _ in source.classes]
    return json_digest([FORMAT, source.layout, class_ids, source.fingerprint_items, settings, seed])
