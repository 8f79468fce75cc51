"""The faults: each does its damage and says in words what it did. Reactions are the run's own."""

from __future__ import annotations

import errno
import os
import random
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil

from pipeline.chaos.driver import Driver
from pipeline.checkpoint.manifest import list_checkpoints
from pipeline.errors import Interrupted

END_S = 300.0  # of a driver that was asked to stop, or whose Ray was lost
_FULL_S = 60.0  # a disk stays full, unless a checkpoint fails before
_CHUNK = 1 << 20
_MESSAGE = "could not be written"  # of a checkpoint, on a full disk


@dataclass(frozen=True)
class Fault:
    """A kind of fault.

    ``apply`` returns what it did, or '' if that is not possible now.
    """

    name: str
    apply: Callable[[Driver, random.Random], str]
    needs_disk: bool = False  # the run directory is on a file system of its own


def _kill_rank(driver: Driver, choices: random.Random) -> str:
    process = _rank(driver, choices)
    if process is None:
        return ""
    process.kill()
    return f"killed process {process.pid} of a rank"


def _stop_rank(driver: Driver, choices: random.Random) -> str:
    process = _rank(driver, choices)
    if process is None:
        return ""
    # It exists and answers nothing: only its heartbeat shows that it hangs.
    process.suspend()
    return f"stopped process {process.pid} of a rank (SIGSTOP)"


def _rank(driver: Driver, choices: random.Random) -> psutil.Process | None:
    # In a fixed order, so that the seed alone decides which rank it is.
    ranks = sorted(driver.ranks(), key=lambda rank: rank.pid)
    return choices.choice(ranks) if ranks else None


def _kill_driver(driver: Driver, choices: random.Random) -> str:
    driver.ranks()  # remembers whose processes must end
    driver.send(signal.SIGKILL)
    driver.wait(END_S)
    return "killed the driver"


def _ask_driver(driver: Driver, choices: random.Random) -> str:
    # A scheduler, a closed terminal, Slurm's warning before a time limit, and Ctrl-C.
    number = choices.choice([signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGINT])
    driver.send(number)
    code = driver.wait(END_S)
    return f"asked the driver to stop ({number.name}): exit code {code}"


def _kill_raylet(driver: Driver, choices: random.Random) -> str:
    # Without either of them Ray is lost on this machine, and no group can start again.
    name = choices.choice(["raylet", "gcs_server"])
    server = driver.server(name)
    if server is None:
        return ""
    server.kill()
    code = driver.wait(END_S)
    return f"killed Ray's {name}: exit code {code}"


def _flip_bit(driver: Driver, choices: random.Random) -> str:
    """Of the newest checkpoint, while no driver runs; one more must be there to return to."""
    driver.send(signal.SIGTERM)
    code = driver.wait(END_S)
    if code != Interrupted.exit_code:
        return f"asked the driver to stop (SIGTERM): exit code {code}"
    for stage in reversed(driver.stages):
        checkpoints = list_checkpoints(driver.run_dir.checkpoints(stage))
        if len(checkpoints) < 2:
            continue
        # Any of its files: weights, moments, the state of the loop, the manifest.
        newest = checkpoints[0][1]
        path = choices.choice(sorted(path for path in newest.iterdir() if path.is_file()))
        flip_a_bit(path, choices)
        return f"flipped a bit of {path.name} in the newest checkpoint of {stage}"
    return f"asked the driver to stop (SIGTERM): exit code {code}"


def _fill_disk(driver: Driver, choices: random.Random) -> str:
    filler = driver.run_dir.path / ".filler"
    failures = _failures(driver)
    try:
        # Until a checkpoint fails, not for a fixed time: a step may take long.
        _fill(filler)
        driver.wait_until(lambda: _failures(driver) > failures, _FULL_S)
    finally:
        filler.unlink(missing_ok=True)
    missed = _failures(driver) - failures
    return f"filled the disk: {missed} checkpoints could not be written meanwhile"


FAULTS = (
    Fault("kill rank", _kill_rank),
    Fault("stop rank", _stop_rank),
    Fault("kill driver", _kill_driver),
    Fault("stop request", _ask_driver),
    Fault("kill Ray", _kill_raylet),
    Fault("flip bit", _flip_bit),
    Fault("full disk", _fill_disk, needs_disk=True),
)


def flip_a_bit(path: Path, choices: random.Random) -> None:
    """Flip one bit of a file in place; size and time of change stay."""
    stat = path.stat()
    with open(path, "r+b") as file:
        place = choices.randrange(stat.st_size)
        file.seek(place)
        # One bit: a checksum must notice even that.
        byte = file.read(1)[0] ^ (1 << choices.randrange(8))
        file.seek(place)
        file.write(bytes([byte]))
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def _fill(path: Path) -> None:
    with open(path, "wb", buffering=0) as file:
        # Ever smaller pieces: the last bytes count too, since small files still fit into them.
        for size in (_CHUNK, 1 << 12, 1):
            try:
                while True:
                    file.write(bytes(size))
            except OSError as error:
                if error.errno != errno.ENOSPC:
                    raise


def _failures(driver: Driver) -> int:
    # In its output, which is not on the full disk, as the log of the run is.
    return driver.log.read_text(errors="replace").count(_MESSAGE)
