"""DeepSpeed with real processes: every ZeRO stage trains and resumes like a single process."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed.accelerator import get_accelerator

from pipeline.blocks.kind import LAYER_SCALE
from pipeline.checkpoint.manifest import Manifest, list_checkpoints
from pipeline.checkpoint.reader import CheckpointReader
from pipeline.config.schema import TrainConfig
from pipeline.errors import CheckpointError
from pipeline.model import NetworkSpec
from pipeline.model.param_groups import is_alpha
from pipeline.runtime.dist_env import DistEnv
from pipeline.runtime.process_group import process_group
from pipeline.train.checkpointing import load_initial
from pipeline.train.engine import make_engine
from pipeline.train.zero_state import ShardedState
from tests.model.networks import MIXED
from tests.train import processes, small_network
from tests.train.small_network import ONE_THREAD, Options

needs_fp16 = pytest.mark.skipif(
    not get_accelerator().is_fp16_supported(), reason="this processor has no fp16 arithmetic"
)
KINDS = ("master", "exp_avg", "exp_avg_sq", "ema")
Weights = dict[str, torch.Tensor]


def train(path: Path, world_size: int, stage: int, **options: Any) -> dict[str, Any]:
    """Train the small network in ``path``; the report of rank 0."""
    settings = Options(checkpoints=path / "checkpoints", stage=stage, **options)
    results = processes.run(path, world_size, small_network.steps, settings)
    assert isinstance(results[0], dict), results
    first: dict[str, Any] = results[0]
    return first


def values(path: Path, kind: str = "master") -> Weights:
    """The newest checkpoint's tensors of a kind."""
    directory = list_checkpoints(path / "checkpoints")[0][1]
    reader = CheckpointReader(directory, Manifest.read(directory))
    return {name: reader.full(kind, name) for name in reader.shapes}


def flat(weights: Weights) -> torch.Tensor:
    return torch.cat([weights[name].flatten() for name in sorted(weights)]).double()


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Weights]:
    """One process, stored activations, ZeRO 1, fp32: report and weights after ten steps."""
    path = tmp_path_factory.mktemp("single")
    return train(path, 1, 1, activations="stored", steps=10), values(path)


def imports_a_compiler(options: Options) -> bool:
    small_network.steps(options)
    return "torch._inductor.compile_fx" in sys.modules


@pytest.mark.parametrize("stage", [1, 3])
def test_a_training_that_compiles_nothing_imports_no_compiler(stage: int, tmp_path: Path) -> None:
    """A quarter of the time from the start of a process to its first step."""
    options = Options(checkpoints=tmp_path / "checkpoints", stage=stage, steps=1)
    assert processes.run(tmp_path, 1, imports_a_compiler, options) == [False]


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_two_processes_equal_one(
    stage: int, accumulation: int, tmp_path: Path, single: tuple[dict[str, Any], Weights]
) -> None:
    """Exact columns on two processes against stored activations on one, over ten steps."""
    expected, weights = single
    report = train(tmp_path, 2, stage, accumulation=accumulation, steps=10)
    assert report["losses"] == pytest.approx(expected["losses"], rel=1e-5)
    assert report["averaged"] == pytest.approx(expected["averaged"], rel=1e-3)
    assert report["mismatched"] == 0
    trained = values(tmp_path)
    assert (flat(trained) - flat(weights)).norm() <= 1e-5 * flat(weights).norm()
    alphas = {name: value for name, value in trained.items() if is_alpha(name)}
    assert alphas
    for name, alpha in alphas.items():
        assert alpha.abs().min() >= 0.999e-3, name
    if stage == 3:
        # Every level is released as soon as it is no longer needed, and gathered about twice per
        # step. The first step is left out: DeepSpeed does not know the order yet. The last one
        # also evaluates.
        assert report["gathered_after"] == 0
        assert report["gathered_late"] == 0
        assert 1 <= max(report["gathered"][1:-1]) <= 2.1 * accumulation


def test_zero_3_starts_from_the_same_fan_in_weights(tmp_path: Path) -> None:
    """ZeRO-3 partitions layers as they are constructed, before the network initialises them."""
    spec = replace(small_network.SPEC, block=MIXED, init="fan_in", layer_scale=0.5)
    for stage in (1, 3):
        train(tmp_path / str(stage), 2, stage, steps=0, spec=spec, activations="stored")
    whole, partitioned = (values(tmp_path / str(stage)) for stage in (1, 3))
    assert torch.equal(flat(partitioned), flat(whole))
    scales = [value for name, value in partitioned.items() if LAYER_SCALE in name]
    assert scales
    assert all(bool((value == 0.5).all()) for value in scales)
    head = partitioned["classifiers.0.linear.weight"]
    assert head.std().item() * head.shape[1] ** 0.5 == pytest.approx(1, rel=0.3)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_zero_3_keeps_its_precision_on_a_cpu_without_fp16(precision: str, tmp_path: Path) -> None:
    """DeepSpeed chooses the dtype of partitions by what the device supports: the job must win."""
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


@pytest.mark.parametrize(
    ("stage", "precision", "world_size", "accumulation"),
    [
        (0, "fp32", 1, 2),
        (0, "fp32", 2, 1),
        (1, "fp32", 2, 2),
        (1, "bf16", 2, 1),
        (2, "fp32", 2, 1),
        (2, "bf16", 1, 2),
        (2, "bf16", 2, 2),
        pytest.param(2, "fp16", 2, 2, marks=needs_fp16),
        (3, "fp32", 2, 1),
        (3, "bf16", 2, 2),
        pytest.param(3, "fp16", 2, 1, marks=needs_fp16),
    ],
)
def test_resume_is_bit_exact(
    stage: int, precision: str, world_size: int, accumulation: int, tmp_path: Path
) -> None:
    options = {"precision": precision, "accumulation": accumulation}
    complete = train(tmp_path / "a", world_size, stage, **options)
    train(tmp_path / "b", world_size, stage, steps=2, **options)
    resumed = train(tmp_path / "b", world_size, stage, **options)
    assert resumed["losses"] == complete["losses"][2:]
    assert_same_state(tmp_path / "a", tmp_path / "b")


def assert_same_state(first: Path, second: Path) -> None:
    for kind in KINDS:
        a = values(first, kind)
        b = values(second, kind)
        for name in a:
            assert torch.equal(a[name], b[name]), (kind, name)


def test_a_run_of_zero_1_resumes_with_zero_2(tmp_path: Path) -> None:
    """Zero 1 was the default once. Without accumulation, both stages compute the same bits."""
    for name, stage in {"stays": 1, "moves": 2}.items():
        train(tmp_path / name, 2, 1, precision="bf16", steps=2)
        train(tmp_path / name, 2, stage, precision="bf16", steps=3)
    assert_same_state(tmp_path / "stays", tmp_path / "moves")


def test_resume_at_other_world_sizes_and_stages(tmp_path: Path) -> None:
    """2 processes under ZeRO 3, then 1 under ZeRO 1, then 4 under ZeRO 2: ten steps each."""
    expected = train(tmp_path / "stays", 2, 3, steps=22)["losses"]
    train(tmp_path / "moves", 2, 3, steps=2)
    for world_size, stage, first, last in ((1, 1, 2, 12), (4, 2, 12, 22)):
        losses = train(tmp_path / "moves", world_size, stage, steps=last)["losses"]
        assert losses == pytest.approx(expected[first:last], rel=1e-5)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_step_with_nonfinite_gradients_is_skipped_on_all_ranks(
    stage: int, tmp_path: Path
) -> None:
    report = train(tmp_path, 2, stage, nonfinite_step=1, steps=3)
    assert report["applied"] == [True, False, True]
    for kind in ("master", "ema", "exp_avg_sq"):
        for name, value in values(tmp_path, kind).items():
            assert value.isfinite().all(), (kind, name)


class ConstantSource:
    """Weights in which every element is 2."""

    def __init__(self, shapes: dict[str, tuple[int, ...]]) -> None:
        self.shapes = {name: list(shape) for name, shape in shapes.items()}

    def read(self, kind: str, name: str, offset: int, length: int) -> torch.Tensor:
        return torch.full((length,), 2.0)


def load_constant_weights(zero_stage: int, scale: float) -> dict[str, list[float]]:
    """Load ``ConstantSource`` as initial weights; what this rank then holds.

    ``classifier``: largest initial weights of the classifier. By kind: extremes of the stem's
    values (empty where this rank owns none of them).
    """
    dist_env = DistEnv.from_environment()
    config = TrainConfig(
        epochs=1,
        base_lr=1e-3,
        global_batch=8,
        micro_batch=4,
        precision="fp32",
        zero_stage=zero_stage,
    )
    spec = NetworkSpec(
        channels=(8, 16, 24, 32),
        depths=(1, 1, 1, 1),
        columns=2,
        num_classes=7,
        head_init_scale=scale,
    )
    with process_group(dist_env, ONE_THREAD) as device:
        engine = make_engine(spec, config, dist_env, micro_batch=4, seed=3, device=device)
        state = ShardedState(engine, moments=("exp_avg", "exp_avg_sq"), with_ema=True)
        load_initial(ConstantSource(state.shapes), state, "there", lambda text, level="info": None)
        report: dict[str, list[float]] = {kind: [] for kind in (*KINDS, "classifier")}
        for fragment, kind, value in state.tensors():
            if fragment.name == "classifiers.0.linear.weight" and kind == "master":
                report["classifier"].append(float(value.abs().max()))
            if fragment.name == "stem.conv.weight":
                report[kind] += [float(value.min()), float(value.max())]
    return report


@pytest.mark.parametrize("stage", [0, 1, 3])
def test_initial_weights_fill_the_weights_and_the_ema_but_not_the_moments(
    stage: int, tmp_path: Path
) -> None:
    ranks = processes.run(tmp_path, 2, load_constant_weights, stage, 1e-3)
    # The classifier is not loaded, and its initialisation is scaled, under ZeRO-3 too.
    assert 0 < max(value for rank in ranks for value in rank["classifier"]) < 1e-3
    for kind, expected in zip(KINDS, (2.0, 0.0, 0.0, 2.0), strict=True):
        assert {value for rank in ranks for value in rank[kind]} == {expected}, kind


def flip_bit(directory: Path) -> None:
    """Flip one bit in the middle of rank 0's file. A second call restores it."""
    file = directory / "rank-00000.safetensors"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def test_a_damaged_checkpoint_is_refused_by_name_and_the_previous_one_used(tmp_path: Path) -> None:
    train(tmp_path, 2, 1, steps=1)
    train(tmp_path, 2, 1, steps=2)
    newest, previous = (path for _, path in list_checkpoints(tmp_path / "checkpoints"))
    flip_bit(newest)
    with pytest.raises(CheckpointError, match=r"rank-00000\.safetensors"):
        Manifest.read(newest).verify(newest)
    # Restored. Now a file is missing that only rank 1 verifies; rank 0 must log its name.
    flip_bit(newest)
    (newest / "rank-00001.safetensors").unlink()
    report = train(tmp_path, 2, 1, steps=2)
    assert len(report["losses"]) == 1  # resumed from step 1
    assert any("rank-00001.safetensors" in text for text in report["log"])
    assert newest.with_name(f"{newest.name}.refused").is_dir()
    assert newest.is_dir()  # written again
    flip_bit(newest)
    flip_bit(previous)
    settings = Options(checkpoints=tmp_path / "checkpoints", stage=1)
    for result in processes.run(tmp_path, 2, small_network.steps, settings):
        assert isinstance(result, CheckpointError)
        assert "none of the 2" in result.message
