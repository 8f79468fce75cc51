"""Shared by all tests: where the data beside the checkout lies, and which tests are slow."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

os.environ.setdefault("DS_BUILD_OPS", "0")
os.environ.setdefault("DS_ACCELERATOR", "cpu")
# Tests share few cores; spinning threads are slower than one.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# launch.sh sets it; messages in tests must not depend on how the tests were started.
os.environ.pop("PIPELINE_COMMAND", None)

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)
# Under nohup, or in the background of a script, some are ignored, and every program that a test
# starts would inherit that.
for _number in SIGNALS:
    if signal.getsignal(_number) is signal.SIG_IGN:
        signal.signal(_number, signal.SIG_DFL)
# Set by pytest, by the imports of OpenCV, Ray and torch, and by compiled code of torch.
SET_BY_LIBRARIES = {
    "PYTEST_CURRENT_TEST",
    "LD_LIBRARY_PATH",
    "RAY_CLIENT_MODE",
    "PYTORCH_NVML_BASED_CUDA_CHECK",
    "TORCHINDUCTOR_CACHE_DIR",
    "_TORCHINDUCTOR_PYOBJECT_TENSOR_DATA_PTR",
}
ROOT = Path(__file__).resolve().parents[1]

# What `./launch.sh test --fast` leaves out: tests that start process groups, Ray, a server or
# another program, property tests, and tests that take more than about a second.
SLOW_FOLDERS = {"bench", "cluster", "e2e", "evaluate", "export", "orchestrate", "runtime", "train"}
SLOW_FIXTURES = {"session", "server", "proxy", "wheel"}
# Run first, as they take longest: at the end, a worker would be alone with one of them.
LONGEST_FILES = [
    "cluster/test_slurm.py",
    "cluster/test_ray.py",
    "cluster/test_verbs.py",
    "cluster/test_first_runs.py",
]
LONGEST_FOLDERS = ["cluster", "e2e", "train", "model"]
STARTS_PROCESSES = {"subprocess", "multiprocessing"}  # names in a test's own code
STARTS_GROUPS = {"tests.train.processes", "tests.e2e.job_runs"}  # helpers that a module imports
SLOW_TESTS = {  # measured
    "cli/test_exit_codes.py",
    "golden/test_parity.py::test_published_sizes_have_the_published_parameters",
    "model/test_exact.py::test_exact_columns_equal_the_reference",
    "model/test_exact.py::test_stored_columns_change_no_result",
    "model/test_memory.py",
    "model/test_stream_kernels.py::test_a_failed_compilation_falls_back_to_eager_code",
    "prepare/test_memory.py",
    "prepare/test_plan.py",
    "prepare/test_unusable_sources.py::test_a_dataset_smaller_than_one_batch_is_refused_before_training",
    "synthetic/test_generate.py::test_classes_can_be_learned_but_not_from_the_mean_colour",
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


def _place_in_order(item: pytest.Item) -> tuple[int, int]:
    path = item.path.relative_to(ROOT / "tests")
    folder = path.parts[0]
    return (
        LONGEST_FILES.index(str(path)) if str(path) in LONGEST_FILES else len(LONGEST_FILES),
        LONGEST_FOLDERS.index(folder) if folder in LONGEST_FOLDERS else len(LONGEST_FOLDERS),
    )


@pytest.hookimpl(tryfirst=True)  # before pytest deselects by marker
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if _is_slow(item):
            item.add_marker(pytest.mark.slow)
    items.sort(key=_place_in_order)


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


def _process_state() -> dict[str, object]:
    """State of this process that one test could leave behind for the next."""
    state: dict[str, object] = {
        f"environment variable {name}": value
        for name, value in os.environ.items()
        if name not in SET_BY_LIBRARIES
    }
    state |= {f"handler of {number.name}": signal.getsignal(number) for number in SIGNALS}
    state["working directory"] = os.getcwd()
    state["umask"] = _umask()
    # Without importing torch: many tests need none.
    if "torch" in sys.modules:
        torch = sys.modules["torch"]
        state["torch: default dtype"] = torch.get_default_dtype()
        state["torch: threads"] = torch.get_num_threads()
        state["torch: gradients"] = torch.is_grad_enabled()
        state["torch: deterministic"] = torch.are_deterministic_algorithms_enabled()
    return state


def _umask() -> int:
    mask = os.umask(0)  # the only way to read it
    os.umask(mask)
    return mask


@pytest.fixture(autouse=True)
def leaves_no_state() -> Iterator[None]:
    """A test must not change its process: the order of tests would then matter."""
    before = _process_state()
    yield
    after = _process_state()
    changed = {
        name: (before.get(name), after.get(name))
        for name in before | after
        # The first test that imports torch finds no state of torch.
        if before.get(name) != after.get(name) and (name in before or "torch:" not in name)
    }
    assert not changed, f"the test leaves changed (before, after): {changed}"


@pytest.fixture
def restored_handlers() -> Iterator[None]:
    """For code that installs signal handlers: pytest gets its own back."""
    handlers = {number: signal.getsignal(number) for number in SIGNALS}
    for number in SIGNALS:
        signal.signal(number, signal.SIG_DFL)
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)
