"""DeepSpeed with real processes: every ZeRO stage trains, saves, resumes and changes size like a single process does."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.checkpoint.manifest import Manifest, list_checkpoints
from pipeline.checkpoint.reader import CheckpointReader
from pipeline.errors import CheckpointError

WORKER = Path(__file__).with_name("engine_worker.py")


def launch(tmp_path: Path, world: int, **options: Any) -> dict[str, Any]:
    options = {"precision": "fp32", "activations": "exact", "steps": 4, "root": str(tmp_path / "checkpoints"), **options}
    options["result"] = str(tmp_path / "result.json")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    processes = []
    for rank in range(world):
        env = {**os.environ, "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_SIZE": str(world),
               "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo",
               "PYTHONPATH": str(WORKER.parents[2])}  # fmt: skip
        command = [sys.executable, str(WORKER), json.dumps(options)]
        processes.append(subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True))
    output = [process.communicate(timeout=240)[0] for process in processes]
    assert all(process.returncode == 0 for process in processes), "\n".join(text[-3000:] for text in output)
    result: dict[str, Any] = json.loads(Path(options["result"]).read_text())
    return result


def parameters(root: Path) -> dict[str, torch.Tensor]:
    path = list_checkpoints(root)[0][1]
    reader = CheckpointReader(path, Manifest.read(path))
    return {name: reader.full("master", name) for name in reader.shapes}


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """One process, stored activations, ZeRO 1, fp32."""
    path = tmp_path_factory.mktemp("single")
    return launch(path, 1, stage=1, activations="stored"), parameters(path / "checkpoints")


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_two_processes_equal_one(stage: int, tmp_path: Path, single: Any) -> None:
    """Exact reversible columns under every stage against one process with stored activations, accumulation included."""
    expected, weights = single
    found = launch(tmp_path, 2, stage=stage, accumulation=2 if stage in (1, 3) else 1)
    assert found["losses"] == pytest.approx(expected["losses"], rel=1e-4)
    assert found["averaged"] == pytest.approx(expected["averaged"], rel=2e-2, abs=2e-2)
    assert found["mismatched"] == 0
    assert found["smallest_alpha"] >= 0.999e-3
    for name, value in parameters(tmp_path / "checkpoints").items():
        assert (value - weights[name]).norm() <= 2e-3 * weights[name].norm() + 1e-4, name
    if stage == 3:
        assert found["gathered_after"] == 0  # every level was released


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("stage", [1, 3])
def test_resume_is_bit_exact(stage: int, precision: str, tmp_path: Path) -> None:
    undisturbed = launch(tmp_path / "a", 2, stage=stage, precision=precision)
    launch(tmp_path / "b", 2, stage=stage, precision=precision, steps=2)
    resumed = launch(tmp_path / "b", 2, stage=stage, precision=precision)
    assert resumed["losses"] == undisturbed["losses"][2:]
    a, b = parameters(tmp_path / "a" / "checkpoints"), parameters(tmp_path / "b" / "checkpoints")
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_resume_at_another_world_size_and_stage(tmp_path: Path, single: Any) -> None:
    launch(tmp_path, 2, stage=3, steps=1)
    launch(tmp_path, 1, stage=1, steps=2)
    launch(tmp_path, 2, stage=2, steps=3)
    last = launch(tmp_path, 1, stage=0)
    assert last["losses"] == pytest.approx(single[0]["losses"][3:], rel=1e-4)


def test_a_flipped_bit_is_refused_by_name_and_the_one_before_is_used(tmp_path: Path) -> None:
    launch(tmp_path, 1, stage=1, steps=1)
    launch(tmp_path, 1, stage=1, steps=2)
    newest = list_checkpoints(tmp_path / "checkpoints")[0][1]
    victim = newest / "rank-00000.safetensors"
    data = bytearray(victim.read_bytes())
    data[len(data) // 2] ^= 1
    victim.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"rank-00000\.safetensors"):
        Manifest.read(newest).verify(newest)
    assert len(launch(tmp_path, 1, stage=1, steps=2)["losses"]) == 1  # went on from step 1
