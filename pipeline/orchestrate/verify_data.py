"""Verifies a run or a prepared dataset: the work behind the command verify."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from rich.console import Console

from pipeline.config import machine
from pipeline.data.local_shards import PREPARE_AGAIN
from pipeline.errors import DamageError, DataError
from pipeline.layout import RunDir, find_run
from pipeline.monitor.console import Display
from pipeline.orchestrate.ray_session import ray_session
from pipeline.orchestrate.run_lock import is_locked
from pipeline.orchestrate.verify_run import Damage, VerifiedPart, rerun, verify_parts
from pipeline.prepare.verify import describe, find_datasets, prepared_datasets, verify_dataset

_LISTED = 20  # problems shown per remedy


def verify(target: Path, runs: Path) -> None:
    """Verify a run (name or directory) with its datasets, or one dataset.

    Raises:
        DataError: ``target`` is neither.
        DamageError: names every damaged file, with a remedy.
    """
    run_dir = find_run(target, runs)
    display = Display(Console(highlight=False))
    damages: list[Damage] = []
    with display.stage("verify"):
        for part in _parts(target, run_dir, display):
            count = len(part.damages)
            problems = f"{count} problem{'s' if count > 1 else ''}"
            display.log(f"{part.name}: {problems if count else 'ok'}")
            damages += part.damages
    if damages:
        raise DamageError(_listed(damages))


def _parts(target: Path, run_dir: RunDir | None, display: Display) -> Iterator[VerifiedPart]:
    if run_dir is None:
        datasets = find_datasets(target.absolute())
        remedy = PREPARE_AGAIN
    else:
        if is_locked(run_dir):
            display.log("a process is working on this run: its files change meanwhile", "warning")
        display.phase("reading")
        yield from verify_parts(run_dir)
        datasets = prepared_datasets(run_dir)
        remedy = rerun(run_dir, "prepare")
    if not datasets:
        return
    # Verification changes nothing, so a signal may end it anywhere: no handlers are installed.
    with ray_session(machine.cores(), 0) as ray, ray.explained():
        for dataset in datasets:
            try:
                # Absolute: Ray's workers have another current folder.
                problems = verify_dataset(dataset.absolute(), ray.map_tasks, display.progress)
                name = describe(dataset)
            except DataError as error:  # it cannot be opened at all
                problems = [f"{error.place}: {error.cause}"]
                name = str(dataset)
            damages = []
            for problem in problems:
                place, _, cause = problem.partition(": ")
                place = place.replace(str(dataset.absolute()), str(dataset))
                damages.append(Damage(place, cause, remedy))
            yield VerifiedPart(name, damages)


def _listed(damages: list[Damage]) -> str:
    """Every problem on a line of its own, and below those of one remedy, the remedy."""
    # dataset.json is read by two checks: it is listed once.
    by_place = {damage.place: damage for damage in reversed(damages)}
    by_remedy: dict[str, list[str]] = {}
    for damage in reversed(by_place.values()):
        by_remedy.setdefault(damage.remedy, []).append(f"{damage.place}: {damage.cause}")
    count = len(by_place)
    lines = [f"{count} damaged file{'s' if count > 1 else ''}:"]
    for remedy, problems in by_remedy.items():
        lines += [f"    {problem}" for problem in problems[:_LISTED]]
        if len(problems) > _LISTED:
            lines.append(f"    and {len(problems) - _LISTED} more")
        lines.append(f"  -> {remedy}")
    return "\n".join(lines)
