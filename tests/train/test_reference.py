"""Layer decay, weight decay, schedule, clipping and EMA against a small independent reference.

The pipeline trains in two processes under ZeRO 3, stops after three steps and resumes. The
reference is plain PyTorch in one process, with rules of its own.
"""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from pipeline.checkpoint.manifest import Manifest, list_checkpoints
from pipeline.checkpoint.reader import CheckpointReader
from pipeline.config.schema import TrainConfig
from pipeline.model import Network, NetworkSpec
from pipeline.runtime.dist_env import DistEnv
from pipeline.runtime.process_group import process_group
from pipeline.train.alpha_clamp import clamp_alpha
from pipeline.train.checkpointing import restore
from pipeline.train.ema import ema_update
from pipeline.train.engine import make_engine
from pipeline.train.loss import compound_terms
from pipeline.train.optimizer import set_learning_rate
from pipeline.train.schedule import Schedule
from pipeline.train.training_state import TrainingState
from pipeline.train.zero_state import ShardedState
from tests.train import processes
from tests.train.small_network import BATCH, IDENTITY, ONE_THREAD, SEED, batch, save

STEPS = 6
STOP = 3
DEPTHS = (1, 1, 2, 1)
COLUMNS = 4
SPEC = NetworkSpec(
    channels=(8, 16, 24, 32),
    depths=DEPTHS,
    columns=COLUMNS,
    num_classes=7,
    huge=True,
    supervised=True,
    activations="stored",
)
LAYER_DECAY = 0.7
WEIGHT_DECAY = 0.1
CLIP = 0.5
EMA = 0.9
BASE_LR = 3e-3  # for a batch of 4; the batch is 8, so the peak is twice as high
MIN_LR = 1e-4
WARMUP_LR = 2e-4
BETAS = (0.9, 0.99)
EPS = 1e-6


def config(world_size: int, zero_stage: int) -> TrainConfig:
    return TrainConfig(
        epochs=3,
        base_lr=BASE_LR,
        min_lr=MIN_LR,
        warmup_lr=WARMUP_LR,
        warmup_epochs=1,
        base_lr_batch=4,
        global_batch=BATCH,
        micro_batch=BATCH // world_size,
        precision="fp32",
        zero_stage=zero_stage,
        clip_grad=CLIP,
        ema_decay=EMA,
        weight_decay=WEIGHT_DECAY,
        layer_decay=LAYER_DECAY,
        betas=BETAS,
        eps=EPS,
    )


def train_with_the_pipeline(checkpoints: Path, zero_stage: int, until: int) -> None:
    """Train from the newest checkpoint, and write one. Called in each process of a group."""
    dist_env = DistEnv.from_environment()
    settings = config(dist_env.size, zero_stage)
    share = BATCH // dist_env.size
    schedule = Schedule.of(settings, images=2 * BATCH)  # two steps per epoch
    with process_group(dist_env, ONE_THREAD) as device:
        engine = make_engine(SPEC, settings, dist_env, micro_batch=share, seed=SEED, device=device)
        state = ShardedState(engine, moments=("exp_avg", "exp_avg_sq"), with_ema=True)
        restored = restore(checkpoints, state, IDENTITY, lambda text, level="info": None)
        for step in range(restored.step if restored else 0, until):
            set_learning_rate(engine.optimizer.param_groups, schedule(step))
            own = slice(dist_env.rank * share, (dist_env.rank + 1) * share)
            images, pixels, labels = (tensor[own] for tensor in batch(step))
            engine.backward(compound_terms(engine(images, None), pixels, labels).total)
            engine.step()
            clamp_alpha(state)
            ema_update(state, EMA, step)
        training_state = TrainingState(identity=IDENTITY, applied_steps=until)
        save(checkpoints, state, training_state)


def rate(step: int) -> float:
    """Two steps of linear warm-up, four of a cosine that ends at the last step; twice BASE_LR."""
    if step < 2:
        return 2 * (WARMUP_LR + step / 2 * (BASE_LR - WARMUP_LR))
    return 2 * (MIN_LR + (BASE_LR - MIN_LR) * (1 + math.cos(math.pi * (step - 2) / 4)) / 2)


def depth(name: str) -> int:
    """The stem is 0. Column t adds t + 1, a block its number in the column. Heads come last."""
    parts = name.split(".")
    if parts[0] == "stem":
        return 0
    if parts[0] != "columns":
        return sum(DEPTHS) + COLUMNS
    column = int(parts[1])
    level = int(parts[3])
    kind = parts[4]
    if kind == "alpha":
        return column + 1
    block = int(parts[5]) if kind == "blocks" else 0
    return sum(DEPTHS[:level]) + block + column + 1


def train_by_hand() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Weights and their average after all steps."""
    torch.manual_seed(SEED)
    network = Network(SPEC)
    weights = dict(network.named_parameters())
    average = {name: value.detach().clone() for name, value in weights.items()}
    mean = {name: torch.zeros_like(value) for name, value in weights.items()}
    square = {name: torch.zeros_like(value) for name, value in weights.items()}
    for step in range(STEPS):
        network.zero_grad()
        images, pixels, labels = batch(step)
        compound_terms(network(images), pixels, labels).total.backward()
        norm = torch.sqrt(sum((_gradient(w) ** 2).sum() for w in weights.values()))  # type: ignore[arg-type]
        shrink = min(1.0, CLIP / (float(norm) + 1e-6))
        decay = min(EMA, (1 + step) / (10 + step))
        for name, weight in weights.items():
            gradient = shrink * _gradient(weight)
            mean[name] = BETAS[0] * mean[name] + (1 - BETAS[0]) * gradient
            square[name] = BETAS[1] * square[name] + (1 - BETAS[1]) * gradient**2
            own_rate = rate(step) * LAYER_DECAY ** (sum(DEPTHS) + COLUMNS - depth(name))
            is_decayed = weight.dim() > 1 or name.endswith("alpha")
            with torch.no_grad():
                weight -= own_rate * (WEIGHT_DECAY if is_decayed else 0) * weight
                weight -= (
                    own_rate
                    * (mean[name] / (1 - BETAS[0] ** (step + 1)))
                    / (torch.sqrt(square[name] / (1 - BETAS[1] ** (step + 1))) + EPS)
                )
                average[name] = decay * average[name] + (1 - decay) * weight
    return {name: value.detach() for name, value in weights.items()}, average


def _gradient(weight: Tensor) -> Tensor:
    """Zero for an alpha of column 0, which has no effect."""
    return torch.zeros_like(weight) if weight.grad is None else weight.grad


@pytest.mark.parametrize("zero_stage", [2, 3])
def test_two_processes_that_stop_and_resume_equal_the_reference(
    zero_stage: int, tmp_path: Path
) -> None:
    checkpoints = tmp_path / "checkpoints"
    for until in (STOP, STEPS):
        arguments = (train_with_the_pipeline, checkpoints, zero_stage, until)
        assert processes.run(tmp_path / f"until-{until}", 2, *arguments) == [None, None]
    _, newest = list_checkpoints(checkpoints)[0]
    reader = CheckpointReader(newest, Manifest.read(newest))
    weights, average = train_by_hand()
    torch.manual_seed(SEED)
    initial = dict(Network(SPEC).named_parameters())
    for name, weight in weights.items():
        # Compared with the distance that the weight has moved, and with the rounding of its values.
        moved = float((weight - initial[name]).abs().max())
        tolerance = 5e-3 * moved + 3e-7 * float(weight.abs().max())
        for kind, expected in (("master", weight), ("ema", average[name])):
            difference = float((reader.full(kind, name) - expected).abs().max())
            assert difference < tolerance, (kind, name, difference, moved)
    largest = max(float((weights[name] - initial[name]).abs().max()) for name in weights)
    assert largest > 5e-3  # so that the comparison means something
