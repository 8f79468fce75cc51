"""Fixtures of the configuration tests: a source for jobs that need one."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.config.jobs import VARIABLES
from tests.prepare.source_folders import class_tars


@pytest.fixture(scope="session")
def own_images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return class_tars(tmp_path_factory.mktemp("own"), classes=10, count=30, validation=2)


@pytest.fixture
def environment(own_images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Set the variable of every shipped job's source."""
    for name in VARIABLES:
        monkeypatch.setenv(name, str(own_images))
