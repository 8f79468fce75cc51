"""Fixtures of the configuration tests: a source for jobs that need one."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.config.jobs import VARIABLES, describe_export
from tests.prepare.source_folders import class_tars


@pytest.fixture(scope="session")
def own_images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return class_tars(tmp_path_factory.mktemp("own"), classes=10, count=30, validation=2)


@pytest.fixture(scope="session")
def exported_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an exported model, as far as a job reads it: its description."""
    return describe_export(tmp_path_factory.mktemp("export"))


@pytest.fixture
def environment(own_images: Path, exported_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Set the variables of every shipped job: its source, and the model to evaluate."""
    for name in VARIABLES:
        monkeypatch.setenv(name, str(own_images))
    monkeypatch.setenv("TRAINED_MODEL", str(exported_model))
