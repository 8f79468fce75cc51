"""The fingerprint of the dataset that a source gives now, beside the one that was prepared.

See ``source_content`` for what is compared.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import xxhash

from pipeline.config.schema import DatasetConfig
from pipeline.data.description import DatasetDescription
from pipeline.files import json_digest
from pipeline.prepare.context import BuildContext
from pipeline.prepare.extract import printable, unit_members
from pipeline.prepare.fingerprint import fingerprint
from pipeline.prepare.map_tasks import MapTasks
from pipeline.prepare.source_content import add_content, content_of, times_of
from pipeline.sources.digest import source_digest
from pipeline.sources.units import Survey, Unit

# Keys that an earlier version did not have, with the value that its datasets were prepared with.
_ADDED_KEYS = {"exif_orientation": "ignore"}


def current_fingerprint(
    target: Path, source: Survey, config: DatasetConfig, seed: int, tasks: MapTasks
) -> str:
    """The fingerprint that a preparation in ``target`` would give.

    That of the dataset which is there, if it is up to date. Reads the source if its times differ
    from those at the preparation.

    Raises:
        DataError: the source cannot be read.
    """
    expected = fingerprint(source, config, seed)
    try:
        prepared = DatasetDescription.read(target)
    except (FileNotFoundError, ValueError):
        return expected
    # A dataset of an earlier version lacks the new keys: it is accepted as it was prepared.
    before = {key: value for key, value in _ADDED_KEYS.items() if key not in prepared.settings}
    if before:
        expected_before = fingerprint(source, config.model_copy(update=before), seed)
        if prepared.fingerprint == expected_before:
            return expected_before
    if prepared.fingerprint not in (expected, _changed(expected, prepared.source_content)):
        return expected
    times = times_of(target)
    if not (prepared.source_content and times) or times == source_digest(config):
        return prepared.fingerprint
    context = BuildContext(
        target=target, config=config, fingerprint="", units_fingerprint="", seed=seed
    )
    digests = dict(tasks(partial(_unit_content, context), source.units))
    content = content_of(digests[unit] for unit in source.units)
    if content == prepared.source_content:
        return prepared.fingerprint
    return _changed(expected, content)


def _changed(fingerprint_of_names: str, content: str) -> str:
    """The fingerprint of a source that changed in place."""
    return json_digest([fingerprint_of_names, content])


def _unit_content(context: BuildContext, unit: Unit) -> str:
    digest = xxhash.xxh3_128()
    for member in unit_members(context, unit):
        add_content(digest, printable(member.key), member.data)
    return digest.hexdigest()
