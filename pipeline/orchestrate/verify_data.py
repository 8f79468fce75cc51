"""Verifies prepared datasets with Ray: the work behind the command verify."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from pipeline.config import machine
from pipeline.data.local_shards import PREPARE_AGAIN
from pipeline.errors import DataError
from pipeline.monitor.console import Display
from pipeline.orchestrate.ray_session import ray_session
from pipeline.orchestrate.ray_tasks import map_tasks
from pipeline.prepare.verify import describe, find_datasets, verify_dataset

_LISTED = 20  # problems shown in the error


def verify(path: Path) -> None:
    """Verify the datasets of a run directory, or one dataset.

    Raises:
        DataError: no dataset is there, or some have problems.
    """
    display = Display(Console(highlight=False))
    datasets = find_datasets(path.absolute())
    problems: list[str] = []
    # Verification changes nothing, so a signal may end it anywhere: no handlers are installed.
    with ray_session(machine.cores(), 0, started=lambda: None), display.stage("verify"):
        for dataset in datasets:
            new = verify_dataset(dataset, map_tasks, display.progress)
            problems += new
            display.log(f"{describe(dataset)}: {f'{len(new)} problems' if new else 'ok'}")
    if problems:
        listed = "\n".join(f"    {problem}" for problem in problems[:_LISTED])
        raise DataError(
            f"{len(problems)} problems:\n{listed}",
            remedy=PREPARE_AGAIN,
        )
