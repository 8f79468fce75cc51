"""YAML is plain data: scalars of YAML 1.2, no tags, no bombs; any text gives a job or a message."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.config.load import load_job
from pipeline.config.yaml_tree.reading import MAX_NODES, Node, parse
from pipeline.errors import ConfigError
from tests.config.jobs import JOB, error_message, write


@pytest.mark.parametrize(
    ("written", "value"),
    [
        ("1e-4", 1e-4),
        ("-2E+3", -2000.0),
        (".5", 0.5),
        ("5.", 5.0),
        ("+3", 3),
        ("1_000_000", 1_000_000),
        ("0x1F", 31),
        ("007", 7),
        (".inf", math.inf),
        ("-.INF", -math.inf),
        ("true", True),
        ("FALSE", False),
        ("null", None),
        ("~", None),
        ("", None),
        ("yes", "yes"),
        ("off", "off"),
        ("2024-01-01", "2024-01-01"),
        ("1:30", "1:30"),
        ("1.2.3", "1.2.3"),
        ("e5", "e5"),
        ("=", "="),
        ('"1e-4"', "1e-4"),
        ("'true'", "true"),
        ("!!str 5", 5),
        ("[1, a, 2.5]", [1, "a", 2.5]),
        ("|-\n  1", "1"),
    ],
)
def test_scalars_are_typed_by_yaml_1_2(written: str, value: Any) -> None:
    node = parse(f"key: {written}\n", "x.yaml")
    assert node is not None
    parsed = node.data()["key"]
    assert parsed == value
    assert type(parsed) is type(value)


def test_nan_and_endless_digits_are_accepted() -> None:
    node = parse(f"a: .nan\nb: {'9' * 5000}\nc: 0x{'f' * 5000}\n", "x.yaml")
    assert node is not None
    assert math.isnan(node.data()["a"])
    assert node.data()["b"] == math.inf
    assert isinstance(node.data()["c"], str)


def test_each_value_has_the_line_of_its_key() -> None:
    node = parse("a: 1\nb:\n  - x\n  -\n    c: 2\n    d: {e: 3,\n      f: 4}\n", "x.yaml")
    assert node is not None
    assert node.entries()["b"].origin == "x.yaml:2"
    items = node.entries()["b"].value
    assert isinstance(items, list)
    assert [item.origin for item in items] == ["x.yaml:3", "x.yaml:5"]
    inner = items[1].get("d", "f")
    assert inner is not None
    assert (inner.origin, inner.value) == ("x.yaml:7", 4)


@pytest.mark.parametrize(
    "written",
    [
        "!!python/object/apply:os.system [touch owned]",
        "!!python/name:os.system x",
        "!!python/object:os.system {a: 1}",
        "!mine x",
        "!!set {a, b}",
        "!!omap [a: 1]",
        "!!int 5",
        "!!float abc",
        "!!binary aGVsbG8=",
        "!!timestamp 2024-01-01",
    ],
)
def test_tag_of_a_value_is_refused_and_not_executed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, written: str
) -> None:
    monkeypatch.chdir(tmp_path)
    message = error_message(tmp_path, f"name: x\nmodel: {written}\n")
    assert message.startswith("job.yaml:2: the YAML tag '!")
    assert "is not allowed: a job is plain data\n  -> remove the tag" in message
    assert os.listdir(tmp_path) == ["job.yaml"]


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("!mine x", "the YAML tag '!mine' is not allowed"),
        ("!!int 5", "the YAML tag '!!int' is not allowed"),
        ("!!python/object:os.system {a: 1}", "a key must be a single word"),
        ("!!set {a, b}", "a key must be a single word"),
    ],
)
def test_tag_of_a_key_is_refused(tmp_path: Path, key: str, message: str) -> None:
    assert f"job.yaml:1: {message}" in error_message(tmp_path, f"? {key}\n: 1\n")


def test_aliases_are_expanded_and_bombs_refused(tmp_path: Path) -> None:
    text = JOB.replace("    epochs: 3\n", "    epochs: &n 3\n    log_every_steps: *n\n")
    job = load_job(write(tmp_path, text)).job
    assert job.stages.pretrain is not None
    assert job.stages.pretrain.log_every_steps == 3
    levels = [
        "a0: &a0 [x, x, x, x, x, x, x, x, x, x]",
        *(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 12)),
    ]
    assert f"more than {MAX_NODES} values" in error_message(tmp_path, "\n".join(levels))
    assert "job.yaml:1: an alias that contains itself" in error_message(tmp_path, "a: &a [1, *a]\n")
    assert "job.yaml:1: an alias that contains itself" in error_message(
        tmp_path, "a: &a {b: {c: *a}}\n"
    )


@pytest.mark.parametrize("depth", [40, 900, 100_000])
@pytest.mark.parametrize(("opening", "closing"), [("[", "]"), ("{a: ", "}")])
def test_deep_nesting_is_refused(tmp_path: Path, depth: int, opening: str, closing: str) -> None:
    message = error_message(tmp_path, f"name: {opening * depth}{closing * depth}\n")
    assert message.startswith("job.yaml:1: ")
    assert "nest" in message


@settings(max_examples=150, deadline=None)
@given(
    st.one_of(
        st.text(max_size=60),
        st.text(alphabet="ab:- \n\t{}[],&*!#|>\"'$%@0.e", max_size=60),
        st.binary(max_size=40),
    )
)
def test_any_text_gives_a_message(
    tmp_path_factory: pytest.TempPathFactory, text: str | bytes
) -> None:
    content = text if isinstance(text, bytes) else text.encode("utf-8", "replace")
    with pytest.raises(ConfigError):
        load_job(write(tmp_path_factory.getbasetemp(), content, "any.yaml"))


PIECES = st.sampled_from(
    [
        "1",
        "-1",
        "1e400",
        "[]",
        "{}",
        "''",
        '"\\ud7ff"',
        "null",
        "true",
        "${HOME}",
        "auto",
        "{base: revcol_tiny}",
        "[[1]]",
        "x/y",
        "pretrain",
        "9" * 30,
    ]
)


@settings(max_examples=200, deadline=None)
@given(st.sampled_from([line for line in range(1, 13) if line != 9]), PIECES)
def test_any_value_anywhere_gives_a_job_or_a_message(
    tmp_path_factory: pytest.TempPathFactory, line: int, value: str
) -> None:
    lines = JOB.splitlines()
    key = lines[line].partition(":")[0]
    lines[line] = f"{key}: {value}"
    if lines[line + 1 : line + 2] and not value.startswith("{b"):  # remove the lines below the key
        indent = len(key) - len(key.lstrip())
        while (
            line + 1 < len(lines) and len(lines[line + 1]) - len(lines[line + 1].lstrip()) > indent
        ):
            del lines[line + 1]
    path = write(tmp_path_factory.getbasetemp(), "\n".join(lines), "some.yaml")
    try:
        load_job(path)
    except ConfigError as error:
        assert error.message.strip()


def test_replaced_creates_missing_mappings_and_keeps_the_original() -> None:
    tree = Node({"a": Node(1, "f:1")}, "f:1")
    deeper = tree.replaced(("b", "c"), Node(2, "g:1"))
    assert deeper.data() == {"a": 1, "b": {"c": 2}}
    assert tree.data() == {"a": 1}
    assert deeper.replaced(("b", "c"), None).data() == {"a": 1, "b": {}}
