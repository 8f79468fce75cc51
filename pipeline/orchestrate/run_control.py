"""Stops a run, shows its output, brings its results here: for runs of this machine and clusters.

The run directory is read where this machine sees it; where it does not, the cluster is asked.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

from rich.console import Console

from pipeline.command import command
from pipeline.errors import ConfigError
from pipeline.files import write_text
from pipeline.layout import RunDir, find_run, runs_in
from pipeline.monitor.serve import logs_of
from pipeline.orchestrate import sent_files
from pipeline.orchestrate.cluster_run import ClusterRun, cluster_run, shown_run
from pipeline.orchestrate.follow import follow, waiting_text
from pipeline.orchestrate.run_lock import is_locked, read_owner
from pipeline.suggest import did_you_mean

PARTS = ("export", "logs", "tensorboard")  # of a run, for ``fetch``
_PIPE_WIDTH = 160  # columns of output
_POLL_S = 0.5
_MARGIN_S = 60.0  # beyond the grace: the end of the processes and of the job


def find(target: str, runs: Path) -> RunDir:
    """The run that a user names. Its directory is absolute.

    Raises:
        ConfigError: there is none.
    """
    run_dir = find_run(target, runs)
    if run_dir is None:
        names = [known.path.name for known in runs_in(runs)]
        raise ConfigError(
            "there is no such run", place=target, remedy=did_you_mean(target, names, "runs here")
        )
    return RunDir(run_dir.path.absolute())


def stop(run_dir: RunDir, *, now: bool, log: Callable[[str], None]) -> None:
    """Stop a run and wait for its end; ``now``: without a checkpoint.

    Raises:
        ConfigError: nothing is under way, or the run does not end.
    """
    run = cluster_run(run_dir)
    if run is not None and run.state().under_way:
        # The mark keeps Slurm from starting the job again after it has saved.
        here = run.here or (run.record.run_dir if run.record.run_dir.path.is_dir() else None)
        if here is not None:
            write_text(here.stop_mark, f"{time.time():.0f}\n")
        # Also where the mark was written: it alone stops nobody.
        run.launcher.stop(run.record.id, now=now)
        _wait(lambda: run.state().under_way, run_dir, log)
    elif is_locked(run_dir):
        _signal_driver(run_dir, now=now)
        _wait(lambda: is_locked(run_dir), run_dir, log)
    else:
        raise ConfigError(
            "the run is not under way", place=str(run_dir.path), remedy=f"see {command('runs')}"
        )


def _signal_driver(run_dir: RunDir, *, now: bool) -> None:
    """Ask the driver on this machine to end: after a checkpoint, or at once."""
    owner = read_owner(run_dir)
    if owner is None or not owner.is_here:
        holder = "not known" if owner is None else owner.name
        raise ConfigError(
            f"the driver of this run is no process of this machine: {holder}",
            place=str(run_dir.path),
            remedy="stop it there",
        )
    with contextlib.suppress(ProcessLookupError):  # it has just ended
        os.kill(owner.pid, signal.SIGQUIT if now else signal.SIGTERM)


def _wait(under_way: Callable[[], bool], run_dir: RunDir, log: Callable[[str], None]) -> None:
    log("asked to stop; waiting for the end (Ctrl-C: do not wait)")
    # The driver ends within the grace, or is killed. Later than that, something else is wrong.
    deadline = time.monotonic() + _grace(run_dir) + _MARGIN_S
    while under_way():
        if time.monotonic() > deadline:
            raise ConfigError(
                "the run was asked to stop, and has not ended",
                place=str(run_dir.path),
                remedy=f"end it at once: {command('stop', shown_run(run_dir), '--now')}",
            )
        time.sleep(_POLL_S)
    log("stopped; rerun the command that started it to resume")


def _grace(run_dir: RunDir) -> float:
    run = cluster_run(run_dir)
    return float(run.record.config.grace) if run is not None else 600.0


def show_output(run_dir: RunDir, *, rank: int | None, keeps_following: bool) -> None:
    """Print the messages of a run, or what one of its processes has written.

    Raises:
        ConfigError: there is no such output.
    """
    run = cluster_run(run_dir)
    here = run_dir if run is None else run.here
    if here is None:
        assert run is not None
        _show_remote(run, rank, keeps_following)
        return
    # The messages of all attempts. What the driver of a batch job wrote beside them is in its own
    # log, which `run` shows.
    path = here.run_log if rank is None else _log_of_rank(here, rank)
    offset = _print_from(path, 0)
    while keeps_following:
        # Asked before the file is read: what was written before the end is not missed.
        under_way = run.state().under_way if run is not None else is_locked(here)
        offset = _print_from(path, offset)
        if not under_way:
            return
        time.sleep(_POLL_S)


def _show_remote(run: ClusterRun, rank: int | None, keeps_following: bool) -> None:
    if rank is not None:
        arguments = ["logs", run.record.directory, "--rank", str(rank)]
        sys.stdout.write(run.launcher.call(run.record.config, arguments))
        return
    if keeps_following:
        follow(run, Console(highlight=False, width=_PIPE_WIDTH), from_start=True)
        return
    state = run.state()
    if state.phase == "pending":
        print(f"{run.where} waits: {waiting_text(state)}")
        return
    output = run.launcher.log(run.record.id, run.record.run_dir.path, run.record.log_start)
    sys.stdout.write(output.decode(errors="replace"))


def _log_of_rank(run_dir: RunDir, rank: int) -> Path:
    """The newest log of a rank that is not empty: of the last stage that wrote something."""
    paths = run_dir.logs.glob(run_dir.log("*", rank).name)
    logs = [path for path in paths if path.stat().st_size]
    newest = max(logs, key=lambda path: path.stat().st_mtime, default=None)
    if newest is None:
        raise ConfigError(
            f"rank {rank} has written nothing yet",
            place=str(run_dir.logs),
            remedy="ranks count from 0 to the number of processes - 1",
        )
    return newest


def _print_from(path: Path, offset: int) -> int:
    """Print a file from ``offset`` bytes on; returns the new offset. It may not exist yet."""
    try:
        with open(path, "rb") as file:
            file.seek(offset)
            output = file.read()
    except FileNotFoundError:
        return offset
    sys.stdout.write(output.decode(errors="replace"))
    sys.stdout.flush()
    return offset + len(output)


def fetch(run_dir: RunDir, part: str) -> Path:
    """Bring a part of a run to this machine; returns where it is.

    Raises:
        ConfigError: there is no such part, or the run has none yet.
    """
    if part not in PARTS:
        raise ConfigError(
            "is no part of a run", place=part, remedy=did_you_mean(part, PARTS, "parts")
        )
    target = part_of(run_dir, part)
    run = cluster_run(run_dir)
    here = run_dir if run is None else run.here
    if run is not None and here is None:
        text = run.launcher.call(run.record.config, ["send", run.record.directory, part])
        sent_files.unpack(text, target)
        return target
    assert here is not None
    # Of a run of this machine, source and target are the same: then the path is all to report.
    source = part_of(here, part)
    if not source.is_dir():
        raise ConfigError(
            f"the run has no {part} yet", place=str(source), remedy=f"see {command('runs')}"
        )
    if source != target:
        # Copied under another name first: an interrupted copy must not look like a result.
        copy = target.with_name(f".{target.name}.fetched")
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(source, copy)
        sent_files.replace_folder(copy, target)
    return target


def viewer_of(target: str, runs: Path) -> str:
    """How to show the curves of a run where they are, as text; '': ``curves_of`` brings them."""
    run_dir = find_run(target, runs) if target else None
    run = cluster_run(RunDir(run_dir.path.absolute())) if run_dir is not None else None
    if run is None or run.here is not None:
        return ""
    return run.launcher.viewer(shown_run(run.run_dir), run.record.run_dir.path)


def curves_of(target: str, runs: Path) -> Path:
    """The folder that TensorBoard reads: of one run (name or directory), or of all if it is ''.

    Raises:
        ConfigError: there is no such run, or it has no curves yet.
    """
    run_dir = find_run(target, runs) if target else None
    run = cluster_run(RunDir(run_dir.path.absolute())) if run_dir is not None else None
    if run is None:
        return logs_of(target, runs)
    if run.here is not None:
        return logs_of(str(run.here.path), runs)
    # Event files are small: a copy of the present ones is served. A new call brings new ones.
    return fetch(run.run_dir, "tensorboard")


def part_of(run_dir: RunDir, part: str) -> Path:
    """The folder of one of ``PARTS``."""
    folders = {"export": run_dir.export, "logs": run_dir.logs, "tensorboard": run_dir.tensorboard()}
    return folders[part]
