"""launch.sh creates the environment once, adds sets of packages, keeps an active environment."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[2]
INSTALLING = "installing"
PRINT_WHAT_RUNS = """
import os, sys
print(sys.prefix, sys.argv[1:], os.environ["PIPELINE_COMMAND"])
sys.exit(int(sys.argv[-1]))
"""


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A checkout whose lock files are empty and whose package prints what launch.sh started."""
    folder = tmp_path / "a checkout"
    (folder / "pipeline").mkdir(parents=True)
    (folder / "pipeline" / "__init__.py").touch()
    (folder / "pipeline" / "__main__.py").write_text(PRINT_WHAT_RUNS)
    (folder / "requirements").mkdir()
    for name in ("run", "dev", "bench", "s3"):
        (folder / "requirements" / f"{name}.txt").write_text("# nothing\n")
    shutil.copy(ROOT / "launch.sh", folder)
    return folder


def launch(checkout: Path, *arguments: str, **environment: str) -> subprocess.Popen[str]:
    """Start launch.sh in the checkout. It finds this interpreter and no active environment."""
    hidden = ("VIRTUAL_ENV", "PYTHONPATH", "PIPELINE_COMMAND")
    kept = {key: value for key, value in os.environ.items() if key not in hidden}
    return subprocess.Popen(
        ["./launch.sh", *arguments],
        cwd=checkout,
        env=kept | {"PYTHON": sys.executable} | environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def finish(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    """(exit code, standard output, standard error)."""
    out, error = process.communicate(timeout=120)
    return process.returncode, out, error


def installs(checkout: Path, *arguments: str) -> bool:
    """True if this launch installs something."""
    code, _, error = finish(launch(checkout, *arguments))
    assert code == 0, error
    return INSTALLING in error


def installed_sets(checkout: Path) -> set[str]:
    return {stamp.name.removeprefix(".installed-") for stamp in checkout.glob(".venv/.installed-*")}


def set_pins(checkout: Path, name: str, text: str) -> None:
    (checkout / "requirements" / f"{name}.txt").write_text(text)


def pip_version(checkout: Path) -> str:
    """Version of the one distribution in a fresh environment: a pin that needs no network."""
    printed = subprocess.run(
        [checkout / ".venv/bin/python", "-c", "import pip; print(pip.__version__)"],
        capture_output=True,
        text=True,
        check=True,
    )
    return printed.stdout.strip()


def test_arguments_exit_code_and_the_typed_command_pass_through(checkout: Path) -> None:
    code, out, error = finish(launch(checkout, "jobs/a b.yaml", "7"))
    assert code == 7
    assert out == f"{checkout / '.venv'} ['jobs/a b.yaml', '7'] ./launch.sh\n"
    assert INSTALLING in error


def test_environment_is_created_once_and_again_when_pins_change(checkout: Path) -> None:
    assert installs(checkout, "0")
    assert not installs(checkout, "0")
    set_pins(checkout, "run", "# nothing\n# only a comment\n")
    assert not installs(checkout, "0")
    set_pins(checkout, "run", f"pip=={pip_version(checkout)}\n")
    assert installs(checkout, "0")
    (checkout / ".venv" / ".installed-run").unlink()  # as if the installation had been interrupted
    assert installs(checkout, "0")


def test_a_job_installs_no_test_tools(checkout: Path) -> None:
    assert installs(checkout, "0")
    assert installed_sets(checkout) == {"run"}
    assert installs(checkout, "test", "0")
    assert installed_sets(checkout) == {"run", "dev"}
    assert not installs(checkout, "test", "0")


def test_other_sets_are_added_to_the_same_environment(checkout: Path) -> None:
    assert installs(checkout, "0")
    marker = checkout / ".venv" / "marker"
    marker.touch()
    assert installs(checkout, "install", "s3")
    assert installs(checkout, "bench", "0")
    assert marker.exists()
    assert installed_sets(checkout) == {"run", "s3", "bench"}
    set_pins(checkout, "bench", f"pip=={pip_version(checkout)}\n")
    assert installs(checkout, "bench", "0")
    assert marker.exists()


def test_an_unknown_set_is_refused_with_the_known_ones(checkout: Path) -> None:
    code, _, error = finish(launch(checkout, "install", "s4"))
    assert code == 2
    assert "unknown set of packages 's4'" in error
    assert "bench.txt dev.txt run.txt s3.txt" in error
    assert not (checkout / ".venv").exists()


def test_a_path_with_a_colon_is_refused_before_anything_is_installed(checkout: Path) -> None:
    """PYTHONPATH and PATH cannot hold it."""
    moved = checkout.rename(checkout.with_name("12:30"))
    code, _, error = finish(launch(moved, "0"))
    assert code == 2
    assert f"has a colon, which separates paths: {moved}" in error
    assert not (moved / ".venv").exists()


@pytest.mark.parametrize("setting", ["PIP_USER", "PIP_TARGET", "PIP_PREFIX"])
def test_packages_go_into_the_environment_with_any_setting_of_pip(
    checkout: Path, tmp_path: Path, setting: str
) -> None:
    wheel = tmp_path / "wheels" / "tiny-1.0-py3-none-any.whl"
    wheel.parent.mkdir()
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("tiny.py", "")
        about = "Metadata-Version: 2.1\nName: tiny\nVersion: 1.0\n"
        archive.writestr("tiny-1.0.dist-info/METADATA", about)
        tag = "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        archive.writestr("tiny-1.0.dist-info/WHEEL", tag)
        archive.writestr("tiny-1.0.dist-info/RECORD", "")
    set_pins(checkout, "run", "tiny==1.0\n")
    elsewhere = tmp_path / "elsewhere"
    settings = {setting: "1" if setting == "PIP_USER" else str(elsewhere), "HOME": str(tmp_path)}
    local = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(wheel.parent)}
    code, _, error = finish(launch(checkout, "0", **settings, **local))
    assert code == 0, error
    assert list((checkout / ".venv").glob("lib/python3*/site-packages/tiny.py"))
    assert not elsewhere.exists()
    assert not (tmp_path / ".local").exists()


def test_two_launches_at_once_install_once(checkout: Path) -> None:
    both = [launch(checkout, "0") for _ in range(2)]
    results = [finish(process) for process in both]
    assert [code for code, _, _ in results] == [0, 0]
    assert sum(INSTALLING in error for _, _, error in results) == 1


def test_an_active_environment_with_the_packages_is_used_as_it_is(
    checkout: Path, tmp_path: Path
) -> None:
    active = tmp_path / "active"
    subprocess.run([sys.executable, "-m", "venv", active], check=True)
    code, out, _ = finish(launch(checkout, "0", VIRTUAL_ENV=str(active)))
    assert code == 0
    assert out == f"{active} ['0'] ./launch.sh\n"
    assert not (checkout / ".venv").exists()


def test_an_active_environment_that_lacks_a_package_is_left_alone(
    checkout: Path, tmp_path: Path
) -> None:
    active = tmp_path / "active"
    subprocess.run([sys.executable, "-m", "venv", active], check=True)
    set_pins(checkout, "run", "a-package-that-no-environment-has==1.0\n")
    other = {"VIRTUAL_ENV": str(active), "PYTHON": "/nowhere/python"}
    code, _, error = finish(launch(checkout, "0", **other))
    assert code == 2  # it wants to create .venv, which this interpreter cannot
    assert "set PYTHON=" in error


def test_nothing_is_added_to_an_active_environment(checkout: Path, tmp_path: Path) -> None:
    active = tmp_path / "active"
    subprocess.run([sys.executable, "-m", "venv", active], check=True)
    set_pins(checkout, "s3", "a-package-that-no-environment-has==1.0\n")
    code, _, error = finish(launch(checkout, "install", "s3", VIRTUAL_ENV=str(active)))
    assert code == 2
    assert "pip install -r requirements/s3.txt" in error
    assert not (checkout / ".venv").exists()


@pytest.mark.parametrize(
    ("number", "expected"), [(signal.SIGTERM, 75), (signal.SIGHUP, 75), (signal.SIGINT, 130)]
)
def test_a_stop_request_ends_the_installation(
    checkout: Path, number: signal.Signals, expected: int
) -> None:
    """pip is replaced by a program that never ends."""
    (checkout / "requirements" / "run.txt").write_text("# other pins\n")
    shims = checkout / ".venv" / "bin"
    shims.mkdir(parents=True)
    (shims / "python").write_text('#!/bin/sh\n[ "$2" = pip ] || exit 0\nexec sleep 600\n')
    (shims / "python").chmod(0o755)
    (checkout / "python").write_text("#!/bin/sh\n")  # creates no .venv: that above stays
    (checkout / "python").chmod(0o755)
    (checkout / "rm").write_text("#!/bin/sh\n")
    (checkout / "rm").chmod(0o755)
    process = launch(
        checkout,
        "0",
        PYTHON=str(checkout / "python"),
        PATH=f"{checkout}:{os.environ['PATH']}",
    )
    pip = ["pgrep", "-P", str(process.pid), "-x", "sleep"]
    deadline = time.monotonic() + 30
    while not subprocess.run(pip, capture_output=True, check=False).stdout:
        assert time.monotonic() < deadline, "pip was not started"
        time.sleep(0.05)
    process.send_signal(number)
    code, _, _ = finish(process)  # the output ends only when pip has ended
    assert code == expected


def test_a_missing_interpreter_is_reported(checkout: Path) -> None:
    code, _, error = finish(launch(checkout, "0", PYTHON="/nowhere/python"))
    assert code == 2
    assert "set PYTHON=" in error
