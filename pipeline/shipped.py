"""Folders of the configs and jobs that are shipped with the pipeline."""

from __future__ import annotations

from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent


def _shipped(name: str) -> Path:
    # An installed package contains the folder. In a checkout, it lies beside the package.
    installed = _PACKAGE / name
    return installed if installed.is_dir() else _PACKAGE.parent / name


CONFIGS = _shipped("configs")
JOBS = _shipped("jobs")
