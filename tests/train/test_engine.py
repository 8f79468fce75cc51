"""DeepSpeed with real processes: every ZeRO stage trains, saves, resumes and changes size like a single process does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.checkpoint.manifest import Manifest, list_checkpoints
from pipeline.checkpoint.reader import CheckpointReader
from pipeline.config.schema import TrainConfig
from pipeline.errors import CheckpointError
from pipeline.model.param_groups import is_alpha
from pipeline.runtime.dist_env import DistEnv
from pipeline.runtime.process_group import process_group
from pipeline.train.checkpointing import load_initial
from pipeline.train.engine import make_engine
from pipeline.train.zero_state import ShardedState
from tests.train import processes, small_network
from tests.train.small_network import Options


def train(path: Path, world: int, stage: int, **options: Any) -> dict[str, Any]:
    results = processes.run(
        path, world, small_network.steps, Options(path / "checkpoints", stage, **options)
    )
    assert isinstance(results[0], dict), results
    return results[0]


def values(path: Path, kind: str = "master") -> dict[str, torch.Tensor]:
    directory = list_checkpoints(path / "checkpoints")[0][1]
    reader = CheckpointReader(directory, Manifest.read(directory))
    return {name: reader.full(kind, name) for name in reader.shapes}


def flat(found: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.cat([found[name].flatten() for name in sorted(found)]).double()


@pytest.fixture(scope="module")
def single(
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """One process, stored activations, ZeRO 1, fp32."""
    path = tmp_path_factory.mktemp("single")
    return train(path, 1, 1, activations="stored", steps=10), values(path)


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_two_processes_equal_one(
    stage: int, accumulation: int, tmp_path: Path, single: Any
) -> None:
    """Exact reversible columns under every stage against one process with stored activations, ten steps on."""
    expected, weights = single
    found = train(tmp_path, 2, stage, accumulation=accumulation, steps=10)
    assert found["losses"] == pytest.approx(expected["losses"], rel=1e-5)
    assert found["averaged"] == pytest.approx(expected["averaged"], rel=1e-3)
    assert found["mismatched"] == 0
    trained = values(tmp_path)
    assert (flat(trained) - flat(weights)).norm() <= 1e-5 * flat(weights).norm()
    assert all(value.abs().min() >= 0.999e-3 for name, value in trained.items() if is_alpha(name))
    if stage == 3:  # every level is released as soon as it is done with, and gathered about twice
        assert found["gathered_after"] == found["gathered_late"] == 0
        assert (
            1 <= max(found["gathered"][1:-1]) <= 2.1 * accumulation
        )  # once DeepSpeed knows the order; the last one evaluates


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_zero_3_keeps_its_precision_on_a_cpu_without_fp16(precision: str, tmp_path: Path) -> None:
    """DeepSpeed picks the dtype of partitioned parameters by what the device supports: the job's precision must win."""
    for name, fp16 in {"with": True, "without": False}.items():
        train(tmp_path / name, 2, 3, precision=precision, fp16=fp16)
    assert torch.equal(flat(values(tmp_path / "with")), flat(values(tmp_path / "without")))


@pytest.mark.parametrize(("stage", "accumulation"), [(1, 1), (2, 2), (3, 1), (3, 2)])
def test_bf16_gives_the_bits_of_the_stored_evaluation(
    stage: int, accumulation: int, tmp_path: Path
) -> None:
    """Exact columns against everything stored, in the same arithmetic and under the same engine."""
    for name, reference in {"exact": False, "stored": True}.items():
        train(
            tmp_path / name,
            2,
            stage,
            precision="bf16",
            accumulation=accumulation,
            steps=10,
            reference=reference,
        )
    assert torch.equal(flat(values(tmp_path / "exact")), flat(values(tmp_path / "stored")))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("stage", [1, 3])
def test_resume_is_bit_exact(stage: int, precision: str, tmp_path: Path) -> None:
    undisturbed = train(tmp_path / "a", 2, stage, precision=precision)
    train(tmp_path / "b", 2, stage, precision=precision, steps=2)
    resumed = train(tmp_path / "b", 2, stage, precision=precision)
    assert resumed["losses"] == undisturbed["losses"][2:]
    for kind in ("master", "exp_avg", "exp_avg_sq", "ema"):
        a, b = values(tmp_path / "a", kind), values(tmp_path / "b", kind)
        assert all(torch.equal(a[name], b[name]) for name in a), kind


def test_resume_at_another_world_size_and_stage(tmp_path: Path, single: Any) -> None:
    train(tmp_path, 2, 3, steps=1)
    train(tmp_path, 1, 1, steps=2)
    train(tmp_path, 2, 2, steps=3)
    assert train(tmp_path, 1, 0)["losses"] == pytest.approx(single[0]["losses"][3:4], rel=1e-4)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_step_on_gradients_that_are_not_finite_is_left_out_on_all_ranks(
    stage: int, tmp_path: Path
) -> None:
    found = train(tmp_path, 2, stage, poison=1, steps=3)
    assert found["applied"] == [True, False, True]
    assert all(
        value.isfinite().all()
        for kind in ("master", "ema", "exp_avg_sq")
        for value in values(tmp_path, kind).values()
    )


def heads(zero_stage: int, scale: float) -> dict[str, list[float]]:
    """Standard deviation of the classifier's initial weights, and the moments after weights were loaded."""
    world = DistEnv.from_environment()
    config = TrainConfig(
        epochs=1,
        base_lr=1e-3,
        global_batch=8,
        micro_batch=4,
        precision="fp32",
        zero_stage=zero_stage,
    )
    with process_group(world, use_cuda=False, threads=1) as device:
        spec = small_network.SPEC.__class__(
            (8, 16, 24, 32), (1, 1, 1, 1), 2, 7, head_init_scale=scale
        )
        masters = ShardedState(make_engine(spec, config, world, 4, 3, device), 0.9)

        class Source:
            def __init__(self) -> None:
                self.shapes = {name: list(shape) for name, shape in masters.shapes.items()}

            def read(self, kind: str, name: str, offset: int, length: int) -> torch.Tensor:
                return torch.full((length,), 2.0)

        load_initial(Source(), masters, "there", lambda text, level="info": None)
        found: dict[str, list[float]] = {"classifier": [0.0]}
        for fragment, kind, value in masters.tensors():
            if fragment.name == "classifiers.0.linear.weight" and kind == "master":
                found["classifier"].append(float(value.abs().max()))
            if fragment.name == "stem.conv.weight":
                found.setdefault(kind, []).extend([float(value.min()), float(value.max())])
    return found


@pytest.mark.parametrize("stage", [0, 1, 3])
def test_loaded_weights_become_masters_and_average_but_no_moments(
    stage: int, tmp_path: Path
) -> None:
    ranks = processes.run(tmp_path, 2, heads, stage, 1e-3)
    assert (
        0 < max(max(rank["classifier"]) for rank in ranks) < 1e-3
    )  # scaled under ZeRO-3 too, and not loaded
    for rank in ranks:
        for kind, expected in {
            "master": 2.0,
            "ema_decay": 2.0,
            "exp_avg": 0.0,
            "exp_avg_sq": 0.0,
        }.items():
            assert set(rank.get(kind, [expected])) == {expected}, kind


def damage(directory: Path) -> None:
    victim = directory / "rank-00000.safetensors"
    data = bytearray(victim.read_bytes())
    data[len(data) // 2] ^= 1
    victim.write_bytes(data)


def test_a_flipped_bit_is_refused_by_name_and_the_one_before_is_used(tmp_path: Path) -> None:
    train(tmp_path, 2, 1, steps=1)
    train(tmp_path, 2, 1, steps=2)
    newest, before = (path for _, path in list_checkpoints(tmp_path / "checkpoints"))
    damage(newest)
    with pytest.raises(CheckpointError, match=r"rank-00000\.safetensors"):
        Manifest.read(newest).verify(newest)
    (newest / "rank-00001.safetensors").unlink()
    damage(newest)  # undone: what only rank 1 looks at has to be told by rank 0
    found = train(tmp_path, 2, 1, steps=2)
    assert len(found["losses"]) == 1  # went on from step 1
    assert any("rank-00001.safetensors" in text for text in found["said"])
    assert newest.with_name(f"{newest.name}.refused").is_dir() and newest.is_dir()  # made again
    damage(newest)
    damage(before)
    results = processes.run(tmp_path, 2, small_network.steps, Options(tmp_path / "checkpoints", 1))
    assert all(
        isinstance(result, CheckpointError) and "none of the 2" in result.message
        for result in results
    )
