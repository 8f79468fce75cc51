"""Machines for the tests of clusters."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.fabric import Fabric


@pytest.fixture(scope="module")
def shared_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that all machines of the module see under the same path."""
    return tmp_path_factory.mktemp("shared")


@pytest.fixture(scope="module")
def fabric(shared_folder: Path) -> Iterator[Fabric]:
    """A network without machines: ``fabric.up("n1")`` starts one."""
    with Fabric(shared=[shared_folder]) as fabric:
        yield fabric
