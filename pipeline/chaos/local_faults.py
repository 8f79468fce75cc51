"""Faults of a run on this machine, and of its disk."""

from __future__ import annotations

import errno
import random
import signal
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import psutil

from pipeline.chaos.driver import END_S
from pipeline.chaos.faults import Fault, flip_bit
from pipeline.chaos.local_driver import LocalDriver

_FULL_S = 60.0  # a disk stays full, unless the run warns of it before
_LATE_S = 2.0  # messages that could not be written arrive afterwards
_CHUNK = 1 << 20
_FULL_DISK = "cannot be written: "  # a warning of the driver
_LOST_CHECKPOINT = "could not be written"


def local_faults(driver: LocalDriver, *, has_disk: bool) -> list[Fault]:
    """The kinds. ``has_disk``: the run directory is on a file system of its own."""
    kinds: dict[str, Callable[[LocalDriver, random.Random], str]] = {
        "kill rank": _kill_rank,
        "stop rank": _stop_rank,
        "kill driver": _kill_driver,
        "stop request": _ask_driver,
        "kill Ray": _kill_raylet,
    }
    faults = [Fault(name=name, apply=partial(apply, driver)) for name, apply in kinds.items()]
    faults.append(flip_bit(driver))
    if has_disk:
        faults.append(Fault(name="full disk", apply=partial(_fill_disk, driver)))
    return faults


def _kill_rank(driver: LocalDriver, choices: random.Random) -> str:
    process = _rank(driver, choices)
    if process is None:
        return ""
    process.kill()
    return f"killed process {process.pid} of a rank"


def _stop_rank(driver: LocalDriver, choices: random.Random) -> str:
    process = _rank(driver, choices)
    if process is None:
        return ""
    # It exists and answers nothing: only its heartbeat shows that it hangs.
    process.suspend()
    return f"stopped process {process.pid} of a rank (SIGSTOP)"


def _rank(driver: LocalDriver, choices: random.Random) -> psutil.Process | None:
    # In a fixed order, so that the seed alone decides which rank it is.
    ranks = sorted(driver.ranks(), key=lambda rank: rank.pid)
    return choices.choice(ranks) if ranks else None


def _kill_driver(driver: LocalDriver, choices: random.Random) -> str:
    driver.end()
    return "killed the driver"


def _ask_driver(driver: LocalDriver, choices: random.Random) -> str:
    # A scheduler, a closed terminal, Slurm's warning before a time limit, and Ctrl-C.
    number = choices.choice([signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGINT])
    driver.send(number)
    code = driver.wait(END_S)
    return f"asked the driver to stop ({number.name}): exit code {code}"


def _kill_raylet(driver: LocalDriver, choices: random.Random) -> str:
    # Without either of them Ray is lost on this machine, and no group can start again.
    name = choices.choice(["raylet", "gcs_server"])
    server = driver.server(name)
    if server is None:
        return ""
    server.kill()
    code = driver.wait(END_S)
    return f"killed Ray's {name}: exit code {code}"


def _fill_disk(driver: LocalDriver, choices: random.Random) -> str:
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


def _count(driver: LocalDriver, text: str) -> int:
    """How often a text stands in its output, which is on another disk than the run."""
    return driver.log.read_text(errors="replace").count(text)
