"""Shared by all tests: where the data beside the checkout lies, and which tests are slow."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

os.environ.setdefault("DS_BUILD_OPS", "0")
os.environ.setdefault("DS_ACCELERATOR", "cpu")
# Tests share few cores; spinning threads are slower than one.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# launch.sh sets it; messages in tests must not depend on how the tests were started.
os.environ.pop("PIPELINE_COMMAND", None)

ROOT = Path(__file__).resolve().parents[1]

# What `./launch.sh test --fast` leaves out: tests that start process groups, Ray, a server or
# another program, property tests, and tests that take more than about a second.
SLOW_FOLDERS = {"bench", "e2e", "evaluate", "export", "orchestrate", "runtime", "train"}
SLOW_FIXTURES = {"session", "server", "proxy", "wheel"}
STARTS_PROCESSES = {"subprocess", "multiprocessing"}  # names in a test's own code
STARTS_GROUPS = {"tests.train.processes", "tests.e2e.job_runs"}  # helpers that a module imports
SLOW_TESTS = {  # measured
    "data/test_augment.py::test_crops_lie_inside",
    "data/test_contact_sheet.py",
    "data/test_dataset.py::test_more_shards_than_files_may_be_open",
    "golden/test_parity.py::test_parameters_of_the_published_sizes",
    "model/test_exact.py::test_equals_the_stored_evaluation",
    "model/test_exact.py::test_stored_columns_change_nothing",
    "model/test_modes.py::test_a_column_costs_its_remainders_and_nothing_else",
    "model/test_modes.py::test_memory_of_the_modes_is_ordered",
    "model/test_modes.py::test_modes_share_parameters_and_agree",
    "prepare/test_clean.py::test_a_gzip_bomb_is_not_unpacked",
    "prepare/test_memory.py",
    "prepare/test_plan.py",
    "prepare/test_faults.py::test_damaged_archives_never_stop_the_work",
    "synthetic/test_generate.py::test_learnable_above_chance_but_not_by_mean_colour",
}
LONGEST_FAST = 3.0  # seconds; a fast test that takes longer is named at the end of a fast run


def _starts_processes(item: pytest.Function) -> bool:
    """True if the test's own code starts a process, or its module imports a helper that does."""
    if STARTS_PROCESSES & set(item.function.__code__.co_names):
        return True
    helpers = {getattr(value, "__module__", "") for value in vars(item.module).values()}
    return bool(STARTS_GROUPS & helpers)


def _is_slow(item: pytest.Item) -> bool:
    if not isinstance(item, pytest.Function):
        return False
    path = item.path.relative_to(ROOT / "tests")
    return (
        path.parts[0] in SLOW_FOLDERS
        or bool(SLOW_FIXTURES & set(item.fixturenames))
        or _starts_processes(item)
        or hasattr(item.function, "hypothesis")
        or str(path) in SLOW_TESTS
        or f"{path}::{item.originalname}" in SLOW_TESTS
    )


@pytest.hookimpl(tryfirst=True)  # before pytest deselects by marker
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if _is_slow(item):
            item.add_marker(pytest.mark.slow)


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    """After a run without the slow tests, name those that belong to them."""
    if config.getoption("markexpr") != "not slow":
        return
    reports = terminalreporter.getreports("passed")
    late = sorted({report.nodeid for report in reports if report.duration > LONGEST_FAST})
    for nodeid in late:
        terminalreporter.write_line(f"slower than {LONGEST_FAST} s, mark it slow: {nodeid}")


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder ``shared`` beside the checkout. Without it tests are skipped; under CI, fail."""
    folder = ROOT.parent / "shared"
    if not folder.is_dir():
        if os.environ.get("CI") == "true":
            pytest.fail(f"{folder} is missing")
        pytest.skip(f"{folder} is missing")
    return folder
