"""A small job as text, edits of it, and the message with which a wrong one is refused."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from pipeline.config.check import check
from pipeline.config.load import LoadedJob, load_job
from pipeline.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]
SHIPPED = sorted((ROOT / "jobs").glob("*.yaml"))
TRAINING_JOBS = [path for path in SHIPPED if path.stem != "evaluate"]
VARIABLES = ("IMAGENET22K", "IMAGENET1K", "CIFAR10", "OWN_IMAGES")  # sources of shipped jobs
each_shipped_job = pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
each_training_job = pytest.mark.parametrize("path", TRAINING_JOBS, ids=lambda path: path.stem)

JOB = """\
name: small
model: revcol_quickstart
cluster: local
data:
  toy: {root: "/images", layout: class_tars}
stages:
  prepare: {}
  pretrain:
    recipe: quickstart_pretrain
    epochs: 3
  finetune: {recipe: quickstart_finetune, from: pretrain}
  evaluate: {from: finetune}
  export: {from: finetune}
"""


def write(folder: Path, text: str | bytes, name: str = "job.yaml") -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def edited(*replacements: str, text: str = JOB) -> str:
    """The small job with pieces replaced: old, new, old, new ... Each old piece occurs once."""
    for old, new in zip(replacements[::2], replacements[1::2], strict=True):
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    return text


def describe_export(folder: Path) -> Path:
    """Write an exported model, as far as a job reads it: its description, of ten classes."""
    (folder / "model.safetensors").touch()
    network = {"channels": [8, 16, 24, 32], "depths": [1, 1, 2, 1], "columns": 4, "huge": False}
    description = {
        "network": network | {"num_classes": 10, "activations": "stored", "block": "c2f"},
        "preprocessing": {"image_size": 96, "resize": 1.143},
        "classes": [f"c{label}" for label in range(10)],
    }
    (folder / "model.json").write_text(json.dumps(description))
    return folder


def load_and_check(path: Path, overrides: Sequence[str] = (), world_size: int = 2) -> LoadedJob:
    loaded = load_job(path, overrides)
    check(loaded.job, world_size, loaded.origins)
    return loaded


def error_message(folder: Path, text: str | bytes, *overrides: str, world_size: int = 2) -> str:
    """The message with which a job is refused; file names in it are relative to ``folder``."""
    with pytest.raises(ConfigError) as error:
        load_and_check(write(folder, text), overrides, world_size)
    assert error.value.exit_code == 2
    return error.value.message.replace(f"{folder}/", "")
