"""Tells, without preparing anything, what a preparation would produce or discard."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from pipeline.config.schema import DatasetConfig
from pipeline.prepare.changed_source import current_fingerprint
from pipeline.prepare.context import BuildContext
from pipeline.prepare.map_tasks import Item, Result
from pipeline.sources.survey import survey


def expected_fingerprint(target: Path, config: DatasetConfig, seed: int) -> str:
    """The fingerprint of the dataset that a preparation in ``target`` would leave there.

    Lists the source, and reads it if its times have changed since the dataset was prepared.

    Raises:
        DataError: the source is missing or unusable.
    """
    return current_fingerprint(target, survey(config), config, seed, _in_this_process)


def _in_this_process(
    function: Callable[[Item], Result], items: Sequence[Item]
) -> Iterator[tuple[Item, Result]]:
    for item in items:
        yield item, function(item)


def finished_units(target: Path) -> int:
    """Number of units that an unfinished preparation in ``target`` has done."""
    # Only paths are asked of the context, and they depend on the target alone.
    context = BuildContext(
        target=target, config=DatasetConfig(), fingerprint="", units_fingerprint="", seed=0
    )
    return context.finished_units()
