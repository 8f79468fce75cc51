"""Gradients of several micro-batches are added up in fp32, and DeepSpeed never waits in between."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator

from pipeline.config.schema import TrainConfig
from pipeline.model import NetworkSpec
from pipeline.runtime.dist_env import DistEnv
from pipeline.runtime.process_group import process_group
from pipeline.train import engine as engine_module
from pipeline.train.engine import DeepSpeedEngine, make_engine
from pipeline.train.loss import compound_terms
from pipeline.train.zero_state import ShardedState
from tests.train import processes
from tests.train.small_network import ONE_THREAD

SPEC = NetworkSpec(channels=(8, 16, 24, 32), depths=(1, 1, 1, 1), columns=2, num_classes=7)
MICRO_BATCHES = 4
IMAGES = 2  # per micro-batch and process
FIRST_MOMENT = 0.1  # Adam's first step: exp_avg = (1 - 0.9) * gradient


def engine_of(dist_env: DistEnv, device: torch.device, stage: int, count: int) -> DeepSpeedEngine:
    """A bf16 engine that accumulates ``count`` micro-batches and clips nothing."""
    config = TrainConfig(
        epochs=1,
        base_lr=1e-3,
        global_batch=IMAGES * dist_env.size * count,
        micro_batch=IMAGES,
        precision="bf16",
        zero_stage=stage,
        clip_grad=0,
    )
    return make_engine(SPEC, config, dist_env, micro_batch=IMAGES, seed=3, device=device)


def backward(engine: DeepSpeedEngine, micro_batch: int) -> None:
    generator = torch.Generator().manual_seed(10 * micro_batch + dist.get_rank())
    images = torch.rand(IMAGES, 3, 32, 32, generator=generator)
    labels = torch.randint(0, 7, (IMAGES,), generator=generator)
    engine.backward(compound_terms(engine(images * 2 - 1, None), images, labels).total)
    engine.step()


def gradient(engine: DeepSpeedEngine, micro_batches: list[int]) -> torch.Tensor:
    """The gradient that the optimizer gets: what this rank owns of it, as one vector."""
    state = ShardedState(engine, moments=("exp_avg", "exp_avg_sq"), with_ema=False)
    for micro_batch in micro_batches:
        backward(engine, micro_batch)
    moments = [value.clone() for _, kind, value in state.tensors() if kind == "exp_avg"]
    return torch.cat(moments).double() / FIRST_MOMENT


def accumulation_error(stage: int) -> float:
    """Relative distance of the accumulated gradient from the mean of its micro-batches'."""
    dist_env = DistEnv.from_environment()
    with process_group(dist_env, ONE_THREAD) as device:
        # 1. Each micro-batch alone: its gradient in bf16, with nothing added up.
        alone = [
            gradient(engine_of(dist_env, device, stage, 1), [number])
            for number in range(MICRO_BATCHES)
        ]
        # 2. All of them in one optimizer step.
        together = gradient(
            engine_of(dist_env, device, stage, MICRO_BATCHES), list(range(MICRO_BATCHES))
        )
    mean = torch.stack(alone).mean(0)
    return float((together - mean).norm() / mean.norm())


@pytest.mark.parametrize(("stage", "world_size"), [(2, 1), (2, 2), (3, 2)])
def test_gradients_are_added_up_in_fp32(stage: int, world_size: int, tmp_path: Path) -> None:
    for error in processes.run(tmp_path, world_size, accumulation_error, stage):
        assert error < 1e-6  # bf16 sums are off by 2e-3


def count_device_waits(stage: int) -> int:
    """Calls of ``torch.cuda.synchronize`` that four steps of two micro-batches would make."""
    dist_env = DistEnv.from_environment()
    waits = 0

    def synchronize(device: object = None) -> None:
        nonlocal waits
        waits += 1

    with process_group(dist_env, ONE_THREAD) as device:
        engine = engine_of(dist_env, device, stage, 2)
        get_accelerator().synchronize = synchronize
        for micro_batch in range(8):
            backward(engine, micro_batch)
    return waits


@pytest.mark.parametrize("stage", [1, 2])
def test_no_micro_batch_waits_for_the_device(stage: int, tmp_path: Path) -> None:
    assert processes.run(tmp_path, 1, count_device_waits, stage) == [0]


class ProbedOperators(dict[str, bool]):
    """DeepSpeed's table of operators: the first access probes the machine for all of them."""

    def __setitem__(self, name: str, value: bool) -> None:
        super().__setitem__("probed", True)


@pytest.mark.parametrize(("device", "probes"), [("cpu", True), ("cuda", False)])
def test_only_a_process_on_the_cpu_probes_operators(
    device: str, probes: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    operators = ProbedOperators()
    fake = SimpleNamespace(
        ops=SimpleNamespace(__compatible_ops__=operators),
        init_distributed=lambda backend, verbose: None,
    )
    monkeypatch.setitem(sys.modules, "deepspeed", fake)
    monkeypatch.setattr(os, "environ", dict(os.environ))
    engine_module._import_deepspeed(DistEnv(), torch.device(device))
    assert bool(operators) == probes
