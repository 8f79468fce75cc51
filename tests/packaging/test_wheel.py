"""The wheel: all modules, the shipped configs and jobs, and a command that finds them anywhere."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel of a copy of the checkout, built without the network."""
    copy = tmp_path_factory.mktemp("checkout")
    listing = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    tracked = subprocess.run(listing, cwd=ROOT, capture_output=True, text=True, check=True)
    for name in tracked.stdout.splitlines():
        if not name.startswith("tests/") and (ROOT / name).is_file():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, copy / name)
    target = tmp_path_factory.mktemp("wheel")
    options = ["-q", "--no-deps", "--no-build-isolation", "--no-index", "-w", str(target)]
    command = [sys.executable, "-m", "pip", "wheel", *options, str(copy)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (built,) = target.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the wheel's content, as in site-packages."""
    folder = tmp_path_factory.mktemp("site-packages")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


def run_installed(installed: Path, folder: Path, code: str) -> str:
    """Standard output of ``code`` in ``folder``, with the installed package before everything."""
    program = f"import sys; sys.path.insert(0, {str(installed)!r})\n{code}"
    done = subprocess.run(
        [sys.executable, "-P", "-c", program],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def files_below(folder: Path, *suffixes: str) -> set[str]:
    """Files relative to the folder."""
    return {
        str(path.relative_to(folder))
        for path in folder.rglob("*")
        if path.suffix in suffixes and "__pycache__" not in path.parts
    }


def test_wheel_contains_every_module_and_the_type_marker(installed: Path) -> None:
    package = installed / "pipeline"
    assert files_below(package, ".py") == files_below(ROOT / "pipeline", ".py")
    assert (package / "py.typed").is_file()


def test_wheel_contains_the_shipped_configs_and_jobs(installed: Path) -> None:
    package = installed / "pipeline"
    for name in ("configs", "jobs"):
        shipped = files_below(ROOT / name, ".yaml", ".txt", ".md")
        assert shipped
        assert files_below(package / name, ".yaml", ".txt", ".md") == shipped


def test_wheel_contains_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        tops = {name.partition("/")[0] for name in archive.namelist()}
    assert {name.partition("-")[0] for name in tops} == {"pipeline", "revcol_pipeline"}


def test_metadata_has_the_command_and_the_extras(installed: Path) -> None:
    (info,) = installed.glob("*.dist-info")
    metadata = Parser().parsestr((info / "METADATA").read_text())
    assert metadata["Name"] == "revcol-pipeline"
    assert set(metadata.get_all("Provides-Extra", [])) == {
        "dev",
        "bench",
        "s3",
        "onnx",
        "hub",
        "export",
        "ray",
        "heif",
        "kubernetes",
    }
    assert "pipeline = pipeline.__main__:main" in (info / "entry_points.txt").read_text()


def test_installed_package_finds_its_configs_from_any_folder(
    installed: Path, tmp_path: Path
) -> None:
    code = """
from pipeline.config.load import load_job
from pipeline.shipped import CONFIGS, JOBS
print(CONFIGS, JOBS, load_job(JOBS / "quickstart.yaml", []).job.name)
"""
    package = installed / "pipeline"
    expected = [str(package / "configs"), str(package / "jobs"), "quickstart"]
    assert run_installed(installed, tmp_path, code).split() == expected


def test_installed_command_prints_its_help(installed: Path, tmp_path: Path) -> None:
    code = "sys.argv = ['pipeline', '--help']\nfrom pipeline.cli import main\nmain()"
    assert "predict" in run_installed(installed, tmp_path, code)
