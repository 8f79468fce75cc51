"""The command test: all checks of a checkout."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import typer

ROOT = Path(__file__).resolve().parents[2]
PASS_ON_ARGUMENTS = {"allow_extra_args": True, "ignore_unknown_options": True}
_ALL_TESTS = ["-q", "-n", "2", "--dist", "worksteal"]


def test(context: typer.Context) -> None:
    """Run ruff, mypy and the tests of a checkout. Further arguments go to pytest."""
    os.chdir(ROOT)
    checks = [
        ["ruff", "check", "pipeline", "tests"],
        ["mypy", "--strict", "pipeline"],
        ["pytest", *(context.args or _ALL_TESTS)],
    ]
    # Run all of them, also after a failure: one call shows everything that is wrong.
    failed = [
        check[0]
        for check in checks
        if subprocess.run([sys.executable, "-m", *check], check=False).returncode
    ]
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")
