"""Class lists: the shipped ones, and files of the user."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.errors import ConfigError
from pipeline.sources.class_lists import class_list, class_names
from tests.config.jobs import write


def test_shipped_class_lists_have_their_published_sizes() -> None:
    sizes = {"imagenet1k": 1000, "fall11_21841": 21841, "google_21843": 21843}
    for name, size in sizes.items():
        assert len(class_list(name)) == size
        assert set(class_list(name)) <= set(class_names())
    assert class_names()["n01440764"].startswith("tench")


def test_class_list_file_of_the_user_is_read_and_checked(tmp_path: Path) -> None:
    assert class_list(str(write(tmp_path, "# order\nb bee\n\na\n", "c.txt"))) == ["b", "a"]
    with pytest.raises(
        ConfigError, match=r"c2\.txt:3: the class b is listed twice \(first in line 1\)"
    ):
        class_list(str(write(tmp_path, "b\na\nb\n", "c2.txt")))
    with pytest.raises(ConfigError, match="names no class"):
        class_list(str(write(tmp_path, "# nothing\n", "c3.txt")))
    with pytest.raises(ConfigError, match="cannot be read as a class list"):
        class_list(str(write(tmp_path, b"\xff\n", "c4.txt")))
