"""launch.sh: makes its environment once, again when the pins change, safely when two start at once; respects an active one."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[2]
INSTALLING = "installing the pinned dependencies"


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A checkout with a package that tells its interpreter, and without dependencies."""
    folder = tmp_path / "a checkout"
    (folder / "pipeline").mkdir(parents=True)
    (folder / "pipeline" / "__init__.py").touch()
    (folder / "pipeline" / "__main__.py").write_text(
        "import sys; print(sys.prefix, sys.argv[1:]); sys.exit(int(sys.argv[-1]))"
    )
    (folder / "requirements.txt").write_text("# nothing\n")
    shutil.copy(ROOT / "launch.sh", folder)
    return folder


def launch(checkout: Path, *arguments: str, **environment: str) -> subprocess.Popen[str]:
    kept = {
        key: value for key, value in os.environ.items() if key not in ("VIRTUAL_ENV", "PYTHONPATH")
    }
    command = [str(checkout / "launch.sh"), *arguments]
    settings = kept | {"PYTHON": sys.executable} | environment
    return subprocess.Popen(
        command, env=settings, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


def ended(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    out, error = process.communicate(timeout=120)
    return process.returncode, out, error


def test_the_environment_is_made_once_and_again_when_the_pins_change(checkout: Path) -> None:
    code, out, error = ended(launch(checkout, "jobs/a b.yaml", "7"))
    assert (code, out) == (7, f"{checkout / '.venv'} ['jobs/a b.yaml', '7']\n")
    assert INSTALLING in error
    assert INSTALLING not in ended(launch(checkout, "0"))[2]
    with open(checkout / "requirements.txt", "a") as pins:
        pins.write("# only a comment\n")
    assert INSTALLING not in ended(launch(checkout, "0"))[2]
    version = subprocess.run(
        [checkout / ".venv/bin/python", "-c", "import pip; print(pip.__version__)"],
        capture_output=True,
        text=True,
        check=True,
    )
    (checkout / "requirements.txt").write_text(f"pip=={version.stdout.strip()}\n")
    assert INSTALLING in ended(launch(checkout, "0"))[2]
    (checkout / ".venv" / ".pins").unlink()  # as if the install had been cut short
    assert INSTALLING in ended(launch(checkout, "0"))[2]


def test_two_at_once_install_once(checkout: Path) -> None:
    both = [launch(checkout, "0") for _ in range(2)]
    results = [ended(process) for process in both]
    assert [code for code, _, _ in results] == [0, 0]
    assert sum(INSTALLING in error for _, _, error in results) == 1


def test_an_active_environment_is_used_as_it_is(checkout: Path, tmp_path: Path) -> None:
    active = tmp_path / "active"
    subprocess.run([sys.executable, "-m", "venv", active], check=True)
    code, out, _ = ended(launch(checkout, "0", VIRTUAL_ENV=str(active)))
    assert (code, out) == (0, f"{active} ['0']\n")
    assert not (checkout / ".venv").exists()


def test_an_unfit_interpreter_is_told(checkout: Path) -> None:
    code, _, error = ended(launch(checkout, "0", PYTHON="/nowhere/python"))
    assert code == 2
    assert "set PYTHON=" in error
