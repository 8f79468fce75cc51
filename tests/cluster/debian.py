"""Programs of Debian that tests need: installed if they are missing (as root, with network)."""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest

CACHE = Path.home() / ".cache" / "revcol-pipeline-tests"  # outlives the checkout


def install(programs: Sequence[str], packages: Sequence[str]) -> None:
    """Install the packages, once per host, if one of the programs is missing.

    Where that is impossible, the test fails under CI and is skipped elsewhere.
    """
    if all(map(shutil.which, programs)):
        return
    if os.geteuid() != 0 or shutil.which("apt-get") is None:
        unavailable(f"{programs[0]} is missing: apt-get install {' '.join(packages)}")
    CACHE.mkdir(parents=True, exist_ok=True)
    # Two test processes at a time would find the package manager locked.
    with (CACHE / "apt.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        subprocess.run(["apt-get", "update", "-qq"], check=True)
        options = ["-y", "-qq", "--no-install-recommends"]
        subprocess.run(["apt-get", "install", *options, *packages], check=True)


def unavailable(cause: str) -> None:
    """End a test that cannot run on this machine: a failure under CI."""
    if os.environ.get("CI") == "true":
        pytest.fail(cause)
    pytest.skip(cause)
