"""Machines for the tests of clusters."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.fabric import Fabric
from tests.cluster.image_build import BuiltImage, built_image
from tests.cluster.slurm_machines import SlurmMachines, install


@pytest.fixture(scope="module")
def shared_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that all machines of the module see under the same path."""
    return tmp_path_factory.mktemp("shared")


@pytest.fixture(scope="module")
def fabric(shared_folder: Path) -> Iterator[Fabric]:
    """A network without machines: ``fabric.up("n1")`` starts one."""
    with Fabric(shared=[shared_folder]) as fabric:
        yield fabric


@pytest.fixture(scope="module")
def slurm(fabric: Fabric, shared_folder: Path) -> SlurmMachines:
    """A Slurm of three machines, n1 to n3, and a user on n4."""
    install()
    slurm = SlurmMachines(fabric=fabric, folder=shared_folder)
    slurm.up()
    return slurm


@pytest.fixture(scope="module")
def image() -> Iterator[BuiltImage]:
    """The image of this checkout."""
    with built_image() as image:
        yield image


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """One table of results: what tests have recorded with ``record_property``."""
    reports = terminalreporter.getreports("passed") + terminalreporter.getreports("failed")
    for report in reports:
        if report.when == "call" and report.user_properties:
            name = report.nodeid.rpartition("/")[2]
            values = "  ".join(f"{key}: {value}" for key, value in report.user_properties)
            terminalreporter.write_line(f"{name:<100}  {report.duration:6.1f} s  {values}")
