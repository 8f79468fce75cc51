"""Files, keys, commands, tests and links that the documents name exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from pipeline.config.render import explain
from pipeline.errors import PipelineError
from tests.docs.command_line import (
    arguments_after_program,
    command_names,
    exists,
    is_known,
)
from tests.docs.markdown import DOCUMENTS, ROOT, in_backticks, links, prose

FOLDERS = "pipeline|tests|docs|jobs|configs|docker|requirements|\\.ci"
PATH = re.compile(rf"(?:{FOLDERS})/[\w./*<>-]+|[A-Z]+\.md|launch\.sh|pyproject\.toml")
KEY = re.compile(r"(?:model|cluster|data|stages)\.[a-z_.]+")
NOT_KEYS = {"data.root", "model.safetensors", "model.json", "dataset.json"}
TEST = re.compile(r"(tests/[\w/]+\.py)::(\w+)")
CODE = re.compile(r"\b[CDKRNX][1-9][0-9]?\b")
IDS = [str(document.relative_to(ROOT)) for document in DOCUMENTS]
document = pytest.mark.parametrize("document", DOCUMENTS, ids=IDS)


@document
def test_links_lead_somewhere(document: Path) -> None:
    for target in links(document):
        if not target.startswith(("https://", "#")):
            assert (document.parent / target.partition("#")[0]).exists(), target


@document
def test_paths_exist(document: Path) -> None:
    for text in in_backticks(document):
        if PATH.fullmatch(text):
            assert exists(text), text


@document
def test_keys_of_a_job_exist(document: Path) -> None:
    for text in in_backticks(document):
        if KEY.fullmatch(text) and not text.endswith((".json", ".safetensors", ".yaml", ".py")):
            try:
                explain(text, None)
            except PipelineError:
                pytest.fail(f"{text} is no key of a job")


@document
def test_commands_in_running_text_exist(document: Path) -> None:
    for text in in_backticks(document):
        arguments = arguments_after_program(text.split())
        if arguments and arguments[0] != "...":
            assert is_known(arguments, command_names()), text


@document
def test_named_tests_exist(document: Path) -> None:
    for file, name in TEST.findall(document.read_text(encoding="utf-8")):
        assert f"def {name}(" in (ROOT / file).read_text(), f"{file}::{name}"


def test_fault_codes_of_the_code_are_in_the_catalogue() -> None:
    """A code counts as such in brackets, "(C5)", or in a list of them, "D1, D2"."""
    catalogue = set(CODE.findall(prose(ROOT / "docs" / "faults.md")))
    used: dict[str, str] = {}
    for path in [*(ROOT / "pipeline").rglob("*.py"), *(ROOT / "tests").rglob("*.py")]:
        for listed in re.findall(r"\(([CDKRNX]\d+(?:, ?[CDKRNX]\d+)*)\)", path.read_text()):
            used |= dict.fromkeys(CODE.findall(listed), str(path))
    assert used, "no code found: has the notation changed?"
    unknown = {code: path for code, path in used.items() if code not in catalogue}
    assert not unknown
