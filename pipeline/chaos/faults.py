"""The faults: each does its damage and says in words what it did. Reactions are the run's own."""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from pipeline.chaos.driver import Driver
from pipeline.checkpoint.manifest import list_checkpoints
from pipeline.errors import Interrupted


@dataclass(frozen=True, kw_only=True)
class Fault:
    """A kind of fault of one run.

    ``apply`` returns what it did, or '' if that is not possible now.
    """

    name: str
    apply: Callable[[random.Random], str]


def flip_bit(driver: Driver) -> Fault:
    """Of the newest checkpoint, while no driver runs; one more must be there to return to."""

    def flip(choices: random.Random) -> str:
        code = driver.stop()
        if code != Interrupted.exit_code:
            return stopped(code)
        for stage in reversed(driver.stages):
            checkpoints = list_checkpoints(driver.run_dir.checkpoints(stage))
            if len(checkpoints) < 2:
                continue
            # Any of its files: weights, moments, the state of the loop, the manifest.
            newest = checkpoints[0][1]
            path = choices.choice(sorted(path for path in newest.iterdir() if path.is_file()))
            flip_a_bit(path, choices)
            return f"flipped a bit of {path.name} in the newest checkpoint of {stage}"
        return stopped(code)

    return Fault(name="flip bit", apply=flip)


def stopped(code: int) -> str:
    """What a fault says that has only stopped the run."""
    return f"asked the run to stop: exit code {code}"


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
