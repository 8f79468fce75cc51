"""Datasets, indexes and images are data, never code (fault N5)."""

from __future__ import annotations

import io
import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.config.schema import DatasetConfig
from pipeline.data.dataset import open_dataset
from pipeline.data.shards import index_path
from pipeline.errors import DataError, PipelineError
from pipeline.files import file_digest, write_json
from pipeline.prepare.clean import clean
from pipeline.sources.member import Rejection
from tests.data.small_datasets import make_dataset
from tests.prepare.results import description
from tests.prepare.source_folders import (
    prepare,
)


class Owned:
    """Leaves a mark when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.mark,))


def test_a_pickle_in_place_of_an_index_is_not_run(tmp_path: Path) -> None:
    """Not even if its digest is the one that the dataset expects."""
    make_dataset(tmp_path, {"train": 4})
    index = index_path(tmp_path / "train-00000.parquet")
    mark = tmp_path / "owned"
    for content in (pickle.dumps(Owned(mark)), _object_array(mark)):
        index.write_bytes(content)
        values = description(tmp_path)
        values["splits"]["train"]["shards"][0]["index_digest"] = file_digest(index)
        write_json(tmp_path / "dataset.json", values)
        with pytest.raises((PipelineError, ValueError)):
            open_dataset(tmp_path).split("train")
        assert not mark.exists()


def _object_array(mark: Path) -> bytes:
    out = io.BytesIO()
    np.save(out, np.array([Owned(mark)], dtype=object), allow_pickle=True)
    return out.getvalue()


def test_postscript_is_rejected_and_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pillow would pass it to an interpreter."""
    mark = tmp_path / "owned"
    tools = tmp_path / "bin"
    tools.mkdir()
    (tools / "gs").write_text(f"#!/bin/sh\ntouch {mark}\n")
    (tools / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}:{os.environ['PATH']}")
    program = (
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 100 100\n%%EndComments\nshowpage\n%%EOF\n"
    )
    cleaned = clean(program, "a.JPEG", DatasetConfig(root="x"))
    assert isinstance(cleaned, Rejection)
    assert cleaned.reason == "not_an_image"
    assert not mark.exists()


def test_the_loading_script_of_a_dataset_is_not_run(tmp_path: Path) -> None:
    source = tmp_path / "source"
    mark = tmp_path / "owned"
    source.mkdir()
    (source / "source.py").write_text(f"from pathlib import Path\nPath({str(mark)!r}).touch()\n")
    with pytest.raises(DataError, match="`datasets` cannot load it"):
        prepare(source, tmp_path / "out", layout="huggingface")
    assert not mark.exists()
