"""Registry of block kinds: it needs no torch, and a malformed kind is a clear error."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.blocks import registry

ROOT = Path(__file__).resolve().parents[2]


def test_every_file_in_the_folder_is_a_kind() -> None:
    folder = ROOT / "pipeline" / "blocks" / "kinds"
    names = sorted(path.stem for path in folder.glob("*.py") if path.stem != "__init__")
    assert list(registry.facts()) == names


@pytest.mark.parametrize("name", registry.facts())
def test_facts_are_those_of_the_imported_module(name: str) -> None:
    module = __import__(f"pipeline.blocks.kinds.{name}", fromlist=["FACTS"])
    assert registry.facts()[name] == module.FACTS
    assert registry.kind(name) is module.KIND


def test_reading_the_facts_does_not_import_torch() -> None:
    code = (
        "import sys; from pipeline.blocks import registry; "
        "assert registry.facts(); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_an_unknown_kind_is_a_key_error() -> None:
    with pytest.raises(KeyError, match="resnet"):
        registry.kind("resnet")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("KIND = None\n", "defines no FACTS"),
        ("FACTS = None\n", "defines no FACTS = BlockFacts"),
        ("FACTS = BlockFacts(title='x' + name)\n", "FACTS.title must be a literal"),
        ("FACTS = BlockFacts(shortcut=True)\n", "title"),
        ("FACTS = BlockFacts(title='x', colour='red')\n", "colour"),
    ],
)
def test_a_file_without_readable_facts_is_a_value_error_that_names_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, message: str
) -> None:
    (tmp_path / "broken.py").write_text(source)
    monkeypatch.setattr(registry, "_FOLDER", tmp_path)
    with pytest.raises(ValueError, match=message) as error:
        registry.facts.__wrapped__()
    assert "broken.py" in str(error.value)
