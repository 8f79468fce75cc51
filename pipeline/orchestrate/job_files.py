"""Finds the job file that a command names: a path, or the name of a job that the pipeline ships."""

from __future__ import annotations

import os
from pathlib import Path

from pipeline.errors import ConfigError
from pipeline.shipped import JOBS
from pipeline.suggest import did_you_mean

SUFFIXES = (".yaml", ".yml")


def shipped_jobs() -> dict[str, Path]:
    """The job files that come with the pipeline, by name, in alphabetical order."""
    return {path.stem: path for path in sorted(JOBS.glob("*.yaml"))}


def description(job_file: Path) -> str:
    """The comment in the first line of a job file, or ''."""
    lines = job_file.read_text(encoding="utf-8").splitlines()
    return lines[0].removeprefix("#").strip() if lines and lines[0].startswith("#") else ""


def find_job_file(name: str) -> Path:
    """The job file that ``name`` means.

    Example: for "quickstart", in this order: the file ``quickstart``, the file ``quickstart.yaml``
    (both in the current folder), the shipped job of this name.

    Raises:
        ConfigError: a bare name, and neither a file nor a shipped job has it. A path is returned
            even if it does not exist: the reader of the file reports that.
    """
    path = Path(name)
    # The text decides, not the Path: Path("./quickstart") is Path("quickstart").
    if path.is_file() or os.sep in name or path.suffix in SUFFIXES:
        return path
    # A user's file wins, so that a copy of a shipped job can be changed without being renamed.
    for suffix in SUFFIXES:
        local = Path(name + suffix)
        if local.is_file():
            return local
    shipped = shipped_jobs()
    if name in shipped:
        return shipped[name]
    raise ConfigError(
        "neither a job file nor a shipped job has this name",
        place=name,
        remedy=did_you_mean(name, shipped, "shipped jobs"),
    )
