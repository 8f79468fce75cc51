"""Where the configs and jobs that come with the pipeline lie.

In a checkout ``configs/`` and ``jobs/`` stand beside the package; ``pip install`` puts them inside
it.
"""

from __future__ import annotations

from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent


def _folder(name: str) -> Path:
    installed = _PACKAGE / name
    return installed if installed.is_dir() else _PACKAGE.parent / name


CONFIGS = _folder("configs")
JOBS = _folder("jobs")
