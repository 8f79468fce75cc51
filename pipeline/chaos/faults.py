"""The faults: each does its damage and says in words what it did. Reactions are the run's own."""

from __future__ import annotations

import errno
import os
import random
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil

from pipeline.chaos.driver import Driver
from pipeline.checkpoint.manifest import list_checkpoints
from pipeline.errors import Interrupted

END_S = 300.0  # of a driver that was asked to stop, or whose Ray was lost
_FULL_S = 60.0  # a disk stays full, unless the run warns of it before
_LATE_S = 2.0  # messages that could not be written arrive afterwards
_CHUNK = 1 << 20
_FULL_DISK = "cannot be written: "  # a warning of the driver
_LOST_CHECKPOINT = "could not be written"


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
    driver.end()
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
    warnings = _count(driver, _FULL_DISK)
    lost = _count(driver, _LOST_CHECKPOINT)
    try:
        _fill(filler)
        driver.wait_until(lambda: _count(driver, _FULL_DISK) > warnings, _FULL_S)
        # Long enough for some checkpoints of a short job, and little of a long one.
        time.sleep(choices.uniform(0, 10))
    finally:
        filler.unlink(missing_ok=True)
    time.sleep(_LATE_S)
    lost = _count(driver, _LOST_CHECKPOINT) - lost
    return f"filled the disk: {lost} attempts to write a checkpoint failed meanwhile"


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


def _count(driver: Driver, text: str) -> int:
    """How often a text stands in its output, which is on another disk than the run."""
    return driver.log.read_text(errors="replace").count(text)
