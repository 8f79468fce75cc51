"""Serves the TensorBoard files of runs: the work behind the command tensorboard."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import NoReturn

from pipeline.errors import ConfigError
from pipeline.layout import RunDir


def logs_of(run: str, runs: Path) -> Path:
    """The folder that TensorBoard reads: of one run (name or directory), or of all if it is ''.

    Raises:
        ConfigError: there is no such run.
    """
    candidates = [Path(run), runs / run] if run else [runs]
    directory = next((path for path in candidates if path.is_dir()), None)
    if directory is None:
        known = sorted(path.name for path in runs.glob("*") if path.is_dir())
        raise ConfigError(
            f"there is no run '{run}'" if run else "there are no runs here",
            remedy=f"runs here: {', '.join(known) or 'none'}",
        )
    # A run keeps its curves in a folder of its own; the folder of all runs is searched as a whole.
    logs = RunDir(directory).tensorboard()
    return logs if logs.is_dir() else directory


def serve(logs: Path, host: str, port: int) -> NoReturn:
    """Replace this process by a TensorBoard server."""
    print(
        f"TensorBoard of {logs}: http://{host}:{port}/ (metrics by group: tab Custom Scalars); "
        "Ctrl-C ends it",
        flush=True,
    )
    # TensorBoard's own main loop handles Ctrl-C, and its command line stays the documented one.
    arguments = ["--logdir", str(logs), "--host", host, "--port", str(port)]
    os.execv(sys.executable, [sys.executable, "-m", "tensorboard.main", *arguments])
