"""The command test: all checks of a checkout."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Annotated

import typer

from pipeline.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]
PASS_ON_ARGUMENTS = {"allow_extra_args": True, "ignore_unknown_options": True}
# By file: the tests of a file share machines and prepared runs. Three workers for two cores, as
# tests of clusters wait for schedulers and time limits. The order is that of tests/conftest.py.
_ALL_TESTS = ["-q", "-n", "3", "--dist", "loadfile", "--no-loadscope-reorder", "--durations=40"]
_FAST_TESTS = ["-m", "not slow"]  # tests/conftest.py marks the slow ones


def test(
    context: typer.Context,
    fast: Annotated[
        bool, typer.Option("--fast", help="Leave out the slow tests: under a minute.")
    ] = False,
) -> None:
    """Run ruff, codespell, mypy and the tests of a checkout. Further arguments go to pytest."""
    if not (ROOT / "tests").is_dir():
        raise ConfigError(
            "the tests are not part of an installed package",
            place=str(ROOT),
            remedy="run ./launch.sh test in a checkout",
        )
    os.chdir(ROOT)
    checks = [
        ["ruff", "check", "."],
        ["ruff", "format", "--check", "."],
        ["codespell_lib"],
        ["mypy", "--strict", "pipeline", "docs/make_pictures"],
        ["pytest", *(context.args or _ALL_TESTS), *(_FAST_TESTS if fast else [])],
    ]
    # Run all of them, also after a failure: one call shows everything that is wrong.
    failed = [
        " ".join(check[:2]) if check[0] == "ruff" else check[0]
        for check in checks
        if subprocess.run([sys.executable, "-m", *check], check=False).returncode
    ]
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")
