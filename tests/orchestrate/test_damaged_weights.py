"""Weights from elsewhere are compared with their digest before anything runs."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.errors import PipelineError
from tests.orchestrate import finished_run
from tests.prepare.source_folders import shard_bytes


@pytest.mark.parametrize("damage", ["cut", "flipped bit", "text"])
@pytest.mark.usefixtures("restored_handlers")
def test_damaged_weights_to_start_from_are_refused(damage: str, tmp_path: Path) -> None:
    run = finished_run.make(tmp_path)
    weights = tmp_path / "start.safetensors"
    data = bytearray(run.run_dir.weights("pretrain").read_bytes())
    flipped = bytes(data[:-1]) + bytes([data[-1] ^ 1])
    changed = {"cut": bytes(data[:-2]), "flipped bit": flipped, "text": b"not here"}
    weights.write_bytes(changed[damage])
    before = shard_bytes(run.run_dir.stage("prepare"))
    with pytest.raises(PipelineError, match=r"start\.safetensors"):
        run.call(f"stages.finetune.from={weights}")
    assert shard_bytes(run.run_dir.stage("prepare")) == before
