"""The client of the API server, where it is not installed or not needed."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from pipeline.cluster.kubernetes_client import KubernetesApi
from pipeline.cluster.kubernetes_jobs import KubernetesJobs
from pipeline.errors import ConfigError
from tests.kubernetes.rendered import load, submission


@pytest.fixture
def not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    find_spec = importlib.util.find_spec

    def without(name: str) -> object:
        return None if name == "kubernetes" else find_spec(name)

    monkeypatch.setattr(importlib.util, "find_spec", without)


@pytest.mark.usefixtures("not_installed")
def test_a_missing_client_is_named_with_the_command_that_installs_it() -> None:
    with pytest.raises(ConfigError) as error:
        KubernetesApi()
    assert "the package kubernetes is missing" in error.value.message
    assert "install kubernetes" in error.value.message


@pytest.mark.usefixtures("not_installed")
def test_manifests_are_rendered_without_the_client(tmp_path: Path) -> None:
    loaded = load(tmp_path)
    text = KubernetesJobs(loaded.job.cluster).render(submission(loaded))
    assert "kind: RayJob" in text
