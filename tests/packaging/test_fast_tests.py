"""The selection of `./launch.sh test --fast` names tests that exist and keeps most of them."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from tests.conftest import SLOW_FOLDERS, SLOW_TESTS

ROOT = Path(__file__).resolve().parents[2]


def test_slow_tests_and_folders_exist() -> None:
    for folder in SLOW_FOLDERS:
        assert (ROOT / "tests" / folder).is_dir(), folder
    for entry in SLOW_TESTS:
        path, _, name = entry.partition("::")
        text = (ROOT / "tests" / path).read_text(encoding="utf-8")
        assert not name or f"def {name}(" in text, entry


def test_at_least_60_percent_of_all_tests_are_fast() -> None:
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-m", "not slow"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    counts = re.search(r"(\d+)/(\d+) tests collected", done.stdout)
    assert counts is not None, done.stdout[-2000:]
    fast = int(counts[1])
    total = int(counts[2])
    assert fast >= 0.6 * total
