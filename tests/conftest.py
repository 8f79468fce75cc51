"""Shared by all tests: where the data beside the checkout lies, and what its absence means."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

os.environ.setdefault("DS_BUILD_OPS", "0")
os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault(
    "OMP_NUM_THREADS", "1"
)  # tests share few cores; spinning threads are slower than one

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder ``shared`` beside the checkout: its absence is an error under CI, else a reason to skip."""
    folder = ROOT.parent / "shared"
    if not folder.is_dir():
        if os.environ.get("CI") == "true":
            pytest.fail(f"{folder} is missing")
        pytest.skip(f"{folder} is missing")
    return folder
