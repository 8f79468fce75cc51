"""Read what a preparation left behind."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pipeline.data.dataset import open_dataset


def contents(target: Path, split: str) -> dict[bytes, int]:
    """Label by image of a prepared split."""
    images = open_dataset(target).split(split)
    return {bytes(images.image(i)): images.label(i) for i in range(len(images))}


def description(target: Path) -> dict[str, Any]:
    """The content of dataset.json."""
    values: dict[str, Any] = json.loads((target / "dataset.json").read_text())
    values.pop("digest", None)  # tests change values and write them again
    return values


def quarantine_list(target: Path) -> list[dict[str, str]]:
    lines = (target / "quarantine" / "rejected.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def keys_by_reason(target: Path) -> dict[str, list[str]]:
    """Keys of the images in the quarantine list, by their reason."""
    keys: dict[str, list[str]] = {}
    for entry in quarantine_list(target):
        keys.setdefault(entry["reason"], []).append(entry["key"])
    return keys
