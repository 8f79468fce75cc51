"""Every code block of the documents runs, or is at least parsed by the program it is for."""

from __future__ import annotations

import ast
import importlib
import re
import subprocess
import tomllib
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import pipeline.model
from pipeline.config.load import load_job
from pipeline.config.render import explain
from pipeline.errors import PipelineError
from pipeline.export import official
from pipeline.runtime.torchvision_import import import_torchvision
from pipeline.shipped import JOBS
from tests.checkpoint.published_files import write_published
from tests.config.jobs import describe_export
from tests.docs.command_line import arguments_after_program, parse
from tests.docs.markdown import DOCUMENTS, FENCE, ROOT, Block, blocks, commands
from tests.prepare.source_folders import class_tars

LANGUAGES = {"bash", "python", "yaml", "text"}
# Programs that the documents use besides the pipeline.
OTHER_PROGRAMS = {"export", "git", "cd", "python", "pip", "docker", "pre-commit", "ruff", "pytest"}
OTHER_PROGRAMS |= {"kubectl"}
LINES = [
    pytest.param(block, words, id=f"{block}-{' '.join(words)[:60]}")
    for block in blocks("bash")
    for words in commands(block)
]


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small folder of class tars, for the placeholder DIR."""
    folder = tmp_path_factory.mktemp("images")
    class_tars(folder, classes=3, count=8, validation=2)
    return folder


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An exported model, for the placeholder EXPORT."""
    return describe_export(tmp_path_factory.mktemp("export"))


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A published file, for the placeholder FILE.pth."""
    with torch.device("meta"):
        model = pipeline.model.build("revcol_base", num_classes=3)
    state = official.to_published(model)
    # One zero, seen as many: a small file.
    zeros = {name: torch.zeros(1).expand(value.shape) for name, value in state.items()}
    return write_published(tmp_path_factory.mktemp("weights") / "published.pth", zeros)


@pytest.fixture(autouse=True)
def published_data(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The variables that the jobs for ImageNet need."""
    for name in ("IMAGENET22K", "IMAGENET1K"):
        monkeypatch.setenv(name, str(tmp_path))


def test_every_block_names_its_language() -> None:
    assert {block.language for block in blocks()} == LANGUAGES
    for document in DOCUMENTS:
        text = FENCE.sub("", document.read_text(encoding="utf-8"))
        assert "```" not in text, document
        assert not re.search(r"\n\n {4,}\S", text), f"{document}: an indented block is not checked"


@pytest.mark.parametrize(("block", "words"), LINES)
def test_command_is_understood(
    block: Block, words: list[str], images: Path, export: Path, weights: Path, tmp_path: Path
) -> None:
    arguments = arguments_after_program(words)
    if arguments is None:
        check_other_program(words)
        return
    command, parameters = parse(arguments)
    for name, value in job_settings(command, parameters):
        if name == "job":
            placeholders = {"DIR": images, "EXPORT": export, "FILE.pth": weights}
            check_job(str(value), parameters, placeholders, cluster_of(block, parameters, tmp_path))
        elif name == "key":
            assert explain(str(value), None)


def job_settings(command: str, parameters: dict[str, Any]) -> Iterator[tuple[str, object]]:
    """Parameters whose value can be checked without running the command."""
    if command in ("run", "train"):
        yield "job", parameters["job"]
    if command == "explain":
        yield "key", parameters["key"]


def cluster_of(block: Block, parameters: dict[str, Any], folder: Path) -> str:
    """The value of --on: a name, or a copy of the file that the document shows above the block."""
    on = str(parameters.get("on") or "")
    shown = [
        other
        for other in blocks("yaml")
        if other.document == block.document
        and other.line < block.line
        and other.text.startswith(f"# {on}\n")
    ]
    if not shown:
        return on
    (folder / on).write_text(shown[-1].text)
    return str(folder / on)


def check_job(
    job: str, parameters: dict[str, Any], placeholders: dict[str, Path], cluster: str
) -> None:
    """The job exists and its values are valid. JOB.yaml is a placeholder, too."""
    if re.match(r"[A-Z]+\.yaml$|s3://", job):
        return
    path = ROOT / job if job.endswith(".yaml") else JOBS / f"{job}.yaml"
    overrides = []
    for override in parameters["overrides"] or ():
        key, _, value = str(override).partition("=")
        overrides.append(f"{key}={placeholders.get(value, value)}")
    loaded = load_job(
        path,
        overrides,
        rehearse=bool(parameters.get("rehearse")),
        on=cluster,
        submits=True,
    )
    for stage in parameters.get("stage") or ():
        names = [stage] if isinstance(parameters["stage"], tuple | list) else [parameters["stage"]]
        assert all(getattr(loaded.job.stages, name) is not None for name in names)


def check_other_program(words: list[str]) -> None:
    assert words[0] in OTHER_PROGRAMS, f"unknown program {words[0]}"
    for option, value in pairwise(words):
        if option in ("-r", "-f"):
            assert (ROOT / value).is_file(), value


def test_pip_finds_the_extras_that_are_named() -> None:
    extras = subprocess.run(
        ["git", "grep", "-hoE", r"revcol-pipeline\[[a-z0-9,]+\]"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    known = set(pyproject()["project"]["optional-dependencies"])
    assert set(re.findall(r"[a-z0-9]+(?=[\],])", extras)) <= known


def pyproject() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


@pytest.mark.parametrize("block", blocks("yaml"), ids=str)
def test_yaml_block_is_a_valid_job_or_cluster(block: Block, tmp_path: Path, images: Path) -> None:
    text = block.text.replace("DIR", str(images))
    values = yaml.safe_load(text)
    assert isinstance(values, dict)
    file = tmp_path / "file.yaml"
    file.write_text(text)
    try:
        if "kind" in values:
            load_job(JOBS / "quickstart.yaml", [], on=str(file), submits=True)
        else:
            load_job(file, [])
    except PipelineError as error:
        pytest.fail(f"{block}: {error.message}")


@pytest.mark.parametrize("block", blocks("python"), ids=str)
def test_python_block_compiles_and_its_imports_exist(block: Block) -> None:
    tree = ast.parse(block.text, str(block))
    if "torchvision" in block.text:
        import_torchvision()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                importlib.import_module(alias.name)
        elif isinstance(node, ast.ImportFrom):
            module = importlib.import_module(str(node.module))
            for alias in node.names:
                if not hasattr(module, alias.name):
                    importlib.import_module(f"{node.module}.{alias.name}")


@pytest.mark.parametrize(
    "block",
    # Those of backbone.md run in processes of their own: tests/docs/test_backbone.py.
    [
        block
        for block in blocks("python")
        if "runs/" not in block.text and block.document.name != "backbone.md"
    ],
    ids=str,
)
def test_python_block_runs(block: Block, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    published = pipeline.model.build(
        channels=[8, 16, 32, 48], depths=[1, 2, 3, 2], columns=8, num_classes=12, huge=True
    )
    state = official.to_published(published, published.state_dict())
    torch.save({"model": state}, tmp_path / "published.pth")
    exec(compile(block.text, str(block), "exec"), {})
