"""Which room may import which, and which libraries each room works without."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.architecture.source_tree import PACKAGE, ROOT

MODULES = sorted(PACKAGE.rglob("*.py"))

# Lower rooms first: a module imports only from its own room and from those named for it.
GROUND = {
    "command",
    "errors",
    "files",
    "layout",
    "metric_text",
    "plugins",
    "reporting",
    "shipped",
    "suggest",
}
ROOMS: dict[str, set[str]] = {
    **{name: set() for name in GROUND},
    "blocks": {"plugins"},
    "optimizers": {"plugins"},
    "sources": GROUND,
    "checkpoint": GROUND | {"blocks", "sources"},
    "config": GROUND | {"blocks", "checkpoint", "optimizers", "sources"},
    "model": {"blocks"},
    "data": GROUND | {"config", "sources"},
    "synthetic": GROUND | {"config", "data", "sources"},
    "monitor": GROUND,
    "runtime": GROUND | {"config"},
    "prepare": GROUND | {"config", "data", "sources", "synthetic"},
    "evaluate": GROUND | {"checkpoint", "config", "data", "model", "monitor", "runtime"},
    "train": GROUND
    | {"blocks", "checkpoint", "config", "data", "evaluate", "model", "monitor", "optimizers"}
    | {"runtime"},
    "export": GROUND
    | {"blocks", "checkpoint", "config", "data", "evaluate", "model", "runtime", "sources"},
    "bench": GROUND
    | {"config", "data", "model", "monitor", "prepare", "runtime", "sources", "synthetic"},
    "chaos": GROUND | {"checkpoint", "monitor"},
    "cluster": GROUND | {"config", "runtime"},
    "plan": GROUND | {"checkpoint", "config", "monitor"},
    "orchestrate": GROUND
    | {"checkpoint", "cluster", "config", "data", "evaluate", "export", "monitor", "plan"}
    | {"prepare", "runtime", "sources", "train"},
}
RAY_ROOMS = {"orchestrate"}
RAY_MODULES = {"cluster/ray_jobs.py"}  # of the other rooms
KUBERNETES_MODULE = "cluster/kubernetes_client.py"


def room_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE).parts
    return parts[0].removesuffix(".py")


def imports(path: Path) -> Iterator[str]:
    """Every module that a file imports, wherever in it, but for type checking only."""
    tree = ast.parse(path.read_text())
    skipped = {
        id(child)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
        for child in ast.walk(node)
    }
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            assert node.module is not None
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_rooms_import_only_lower_rooms() -> None:
    wrong: list[str] = []
    for path in MODULES:
        room = room_of(path)
        if room in ("__init__", "__main__", "cli"):
            continue
        allowed = ROOMS[room] | {room}
        used = {
            name.split(".")[1]
            for name in imports(path)
            if name.startswith("pipeline.") and name != "pipeline.__version__"
        }
        wrong += [f"{path.relative_to(PACKAGE)} imports {other}" for other in used - allowed]
    assert not wrong


def test_libraries_are_imported_only_where_they_belong() -> None:
    for path in MODULES:
        room = room_of(path)
        libraries = {name.split(".")[0] for name in imports(path)} - {"pipeline"}
        libraries -= set(sys.stdlib_module_names)
        may_import_ray = room in RAY_ROOMS or str(path.relative_to(PACKAGE)) in RAY_MODULES
        assert "ray" not in libraries or may_import_ray, path
        if str(path.relative_to(PACKAGE)) != KUBERNETES_MODULE:
            assert "kubernetes" not in libraries, path
        if room in ("blocks", "model", "optimizers"):
            assert libraries <= {"torch"}, path


BLOCKER = """
import importlib, sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in BLOCK:
            raise ImportError(f"{name} is not there")

sys.meta_path.insert(0, Blocked())
for name in NAMES:
    importlib.import_module(name)
"""


@pytest.mark.parametrize(
    ("names", "block"),
    [
        (["pipeline.model"], {"ray", "deepspeed", "pydantic", "cv2", "yaml"}),
        (
            ["pipeline.data.loader", "pipeline.data.dataset", "pipeline.data.device"],
            {"ray", "deepspeed", "datasets"},
        ),
        (["pipeline.train.trainer", "pipeline.cli"], {"ray", "datasets"}),
        # The formats of an export: their packages are asked for when they are written.
        (
            ["pipeline.train.trainer", "pipeline.export.stage", "pipeline.export.formats"],
            {"timm", "transformers", "onnx", "onnxscript", "onnxruntime", "torchvision"},
        ),
        (["pipeline.orchestrate.run_job", "pipeline.cluster.kubernetes_jobs"], {"kubernetes"}),
        (["pipeline.export.reload"], {"ray", "deepspeed", "datasets", "tensorboard"}),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_rooms_work_without_what_they_do_not_need(names: list[str], block: set[str]) -> None:
    code = f"BLOCK, NAMES = {block!r}, {names!r}\n{BLOCKER}"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
