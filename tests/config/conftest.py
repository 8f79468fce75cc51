"""Fixtures of the configuration tests: a source for jobs that need one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.config.jobs import VARIABLES
from tests.prepare.source_folders import class_tars


@pytest.fixture(scope="session")
def own_images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return class_tars(tmp_path_factory.mktemp("own"), classes=10, count=30, validation=2)


@pytest.fixture(scope="session")
def exported_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an exported model, as far as a job reads it: its description."""
    folder = tmp_path_factory.mktemp("export")
    (folder / "model.safetensors").touch()
    network = {"channels": [8, 16, 24, 32], "depths": [1, 1, 2, 1], "columns": 4, "huge": False}
    description = {
        "network": network | {"num_classes": 10, "activations": "stored", "block": "c2f"},
        "preprocessing": {"image_size": 96, "resize": 1.143},
        "classes": [f"c{label}" for label in range(10)],
    }
    (folder / "model.json").write_text(json.dumps(description))
    return folder


@pytest.fixture
def environment(own_images: Path, exported_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Set the variables of every shipped job: its source, and the model to evaluate."""
    for name in VARIABLES:
        monkeypatch.setenv(name, str(own_images))
    monkeypatch.setenv("TRAINED_MODEL", str(exported_model))
