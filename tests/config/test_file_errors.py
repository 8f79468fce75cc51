"""Files that are not a job at all (C10), and duplicate keys (C2)."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.config.load import load_job
from pipeline.errors import ConfigError
from tests.config.jobs import JOB, edited, error_message, load_and_check, write


@pytest.mark.parametrize("place", ["job.yaml", "configs/model/mine.yaml"])
def test_c2_duplicate_key_is_refused(tmp_path: Path, place: str) -> None:
    write(tmp_path, "columns: 4\n", "configs/model/mine.yaml")
    text = edited("model: revcol_quickstart", "model: mine")
    twice = (
        edited("epochs: 3", "epochs: 3\n    epochs: 4", text=text)
        if place == "job.yaml"
        else "columns: 4\ncolumns: 5\n"
    )
    write(tmp_path, twice, place)
    message = error_message(tmp_path, twice if place == "job.yaml" else text)
    key, first, second = ("epochs", 10, 11) if place == "job.yaml" else ("columns", 1, 2)
    assert message == (
        f"{place}:{second}: the key '{key}' is written twice (first at {place}:{first})"
        "\n  -> keep one of them"
    )


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            b"",
            "job.yaml: is empty\n  -> a job has a model, data and stages: see jobs/quickstart.yaml",
        ),
        (b"# nothing but this\n", "job.yaml: is empty"),
        (
            b"- name\n- model\n",
            "job.yaml:1: holds a list, not a mapping\n  -> write `key: value` lines",
        ),
        (b"\nname\n", "job.yaml:2: holds a single value, not a mapping"),
        (
            b"name: x\nmodel: caf\xe9\n",
            "job.yaml:2: byte 0xe9 is not UTF-8 text\n  -> save the file as UTF-8",
        ),
        ("name: x\n".encode("utf-16"), "job.yaml:1: byte 0xff is not UTF-8 text"),
        (
            b"name: x\nmodel:\n\tcolumns: 4\n",
            "job.yaml:3: indented with a tab\n  -> indent with spaces: YAML does not accept tabs",
        ),
        (b"name: x\n  \tmodel: y\n", "job.yaml:2: indented with a tab"),
        (b"name: x\n\t# a remark\nmodel: y\n", "job.yaml:2: indented with a tab"),
        (b"name: x: y\n", "job.yaml:1: not readable as YAML"),
        (b"name: x\nmodel: y\0\n", "job.yaml:2: not readable as YAML"),
        (b'name: "a\\0b"\n', "job.yaml:1: a NUL character in a value"),
        (b"name: x\n---\nname: y\n", "job.yaml:2: not readable as YAML"),
        (b"? [a, b]\n: 1\n", "job.yaml:1: a key must be a single word"),
    ],
)
def test_c10_file_that_is_not_a_job_is_refused(
    tmp_path: Path, content: bytes, message: str
) -> None:
    assert message in error_message(tmp_path, content)


def test_c10_folder_instead_of_a_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read: Is a directory"):
        load_job(tmp_path)


def test_byte_order_mark_and_windows_line_ends_are_accepted(tmp_path: Path) -> None:
    load_and_check(write(tmp_path, b"\xef\xbb\xbf" + JOB.replace("\n", "\r\n").encode()))
