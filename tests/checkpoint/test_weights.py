"""The description of weights (``weights.json``): written, read, of earlier versions, or missing."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from pipeline.checkpoint.description import WeightsDescription
from pipeline.errors import CheckpointError
from pipeline.files import write_json
from pipeline.layout import WEIGHTS_FILE, WEIGHTS_JSON

DESCRIPTION = WeightsDescription(
    network={"columns": 4},
    weights="ema",
    step=12,
    classes=["c0", "c1"],
    image_size=64,
    preprocessing="fast",
    precision="bf16",
    data="fingerprint",
    metrics={"top1": 0.5},
)
# Exactly the keys that the version before wrote.
OLD = {
    "network": {"columns": 4},
    "weights": "ema",
    "step": 12,
    "classes": ["c0", "c1"],
    "image_size": 64,
    "resize": 1.143,
    "precision": "bf16",
    "data": "fingerprint",
    "figures": {"top1": 0.5},
}


def _read(weights: Path) -> WeightsDescription:
    """The description without the place that it was read from."""
    return replace(WeightsDescription.read(weights), place="")


def test_a_written_description_is_read_back(tmp_path: Path) -> None:
    DESCRIPTION.write(tmp_path)
    assert _read(tmp_path / WEIGHTS_FILE) == DESCRIPTION


def test_a_description_of_the_version_before_is_read(tmp_path: Path) -> None:
    write_json(tmp_path / WEIGHTS_JSON, OLD)
    assert _read(tmp_path / WEIGHTS_FILE) == DESCRIPTION


def test_weights_without_a_description_have_an_empty_one(tmp_path: Path) -> None:
    empty = WeightsDescription.read(tmp_path / "published.safetensors")
    assert empty == WeightsDescription()
    assert empty.classes is None
    assert empty.image_size is None


def test_unknown_keys_of_a_newer_version_are_ignored(tmp_path: Path) -> None:
    write_json(tmp_path / WEIGHTS_JSON, {"image_size": 64, "added_later": True})
    assert _read(tmp_path / WEIGHTS_FILE) == WeightsDescription(image_size=64)


@pytest.mark.parametrize("content", ["{", "[]", "3"])
def test_a_file_that_is_not_a_description_is_refused(content: str, tmp_path: Path) -> None:
    (tmp_path / WEIGHTS_JSON).write_text(content)
    with pytest.raises(CheckpointError, match=WEIGHTS_JSON):
        WeightsDescription.read(tmp_path / WEIGHTS_FILE)
