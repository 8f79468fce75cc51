"""Packages that a benchmark needs: checked before anything is measured."""

from __future__ import annotations

from collections.abc import Iterable
from importlib.util import find_spec

from pipeline.errors import ConfigError

INSTALL = "pip install 'revcol-pipeline[bench]'"


def require(benchmark: str, packages: Iterable[str]) -> None:
    """Check that ``packages`` can be imported, for ``bench <benchmark>``.

    Without this check, a missing package would be noticed in the middle of a benchmark, as a
    traceback of one of its processes.

    Args:
        packages: names as in ``import``.

    Raises:
        ConfigError: names the missing packages and how to install them.
    """
    missing = [package for package in packages if not _is_installed(package)]
    if missing:
        raise ConfigError(
            f"needs packages that are not installed: {', '.join(missing)}",
            place=f"bench {benchmark}",
            remedy=INSTALL,
        )


def _is_installed(package: str) -> bool:
    # find_spec does not import the package: that would cost seconds and the memory that is
    # measured.
    try:
        return find_spec(package) is not None
    except (ImportError, ValueError):
        # ImportError: a finder refuses the package. ValueError: it is imported in part only.
        return False
