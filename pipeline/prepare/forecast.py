"""Tells, without preparing anything, what a preparation would produce or discard."""

from __future__ import annotations

from pathlib import Path

from pipeline.config.schema import DatasetConfig
from pipeline.prepare.context import BuildContext
from pipeline.prepare.fingerprint import fingerprint
from pipeline.sources.survey import survey


def expected_fingerprint(config: DatasetConfig, seed: int) -> str:
    """The fingerprint of the dataset that a preparation would build. Lists the source.

    Raises:
        DataError: the source is missing or unusable.
    """
    return fingerprint(survey(config), config, seed)


def finished_units(target: Path) -> int:
    """Number of units that an unfinished preparation in ``target`` has done."""
    # Only paths are asked of the context, and they depend on the target alone.
    context = BuildContext(
        target=target, config=DatasetConfig(), fingerprint="", units_fingerprint="", seed=0
    )
    return context.finished_units()
