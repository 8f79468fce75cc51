"""Run directories with small prepared datasets, and stages run in them by groups of processes."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from pipeline.checkpoint.description import WeightsDescription
from pipeline.config.schema import Job
from pipeline.evaluate.classify import evaluate_stage
from pipeline.layout import RunDir
from pipeline.model import build
from pipeline.monitor import tags
from pipeline.monitor.events import Event, read_events
from pipeline.runtime.dist_env import DistEnv
from pipeline.runtime.rank_link import RankLink
from pipeline.train.trainer import train_stage
from tests.data.small_datasets import make_dataset
from tests.train import processes

DATASET = "set"
CLASSES = 6
TRAIN = 67  # 4 steps per epoch
VALIDATION = 23  # a prime number, so that no number of processes divides it
MODEL: dict[str, Any] = {
    "channels": [8, 16, 24, 32],
    "depths": [1, 1, 1, 1],
    "columns": 4,
    "drop_path": 0.1,
}
PRETRAIN: dict[str, Any] = {
    "image_size": 32,
    "epochs": 3,
    "global_batch": 16,
    "precision": "fp32",
    "zero_stage": 1,
    "base_lr": 2e-3,
    "base_lr_batch": 16,
    "warmup_epochs": 1,
    "log_every_steps": 1,
    "eval_every_epochs": 1.5,
}
FINETUNE: dict[str, Any] = PRETRAIN | {
    "from": "pretrain",
    "image_size": 64,
    "epochs": 1,
    "intermediate_supervision": False,
    "layer_decay": 0.8,
    "ema_decay": 0.9,
    "augment": {"mixup": 0, "cutmix": 0, "randaugment": 0},
}


def job(
    pretrain: dict[str, Any] | None = None, finetune: dict[str, Any] | None = None, **model: Any
) -> Job:
    """A job of all stages; ``pretrain`` and ``finetune`` override their settings."""
    stages = {
        "prepare": {},
        "pretrain": PRETRAIN | (pretrain or {}),
        "finetune": FINETUNE | (finetune or {}),
        "evaluate": {"batch": 5},
        "export": {},
    }
    cluster = {"device": "cpu", "threads": 1, "loader_threads": 1}
    return Job.model_validate(
        {
            "name": "t",
            "model": MODEL | model,
            "cluster": cluster,
            "data": {DATASET: {"root": "x"}},
            "stages": stages,
        }
    )


def prepared_run(
    path: Path,
    train: int = TRAIN,
    validation: int = VALIDATION,
    *,
    classes: int = CLASSES,
    **others: int,
) -> RunDir:
    """A run directory whose stage 'prepare' is done. ``others``: images of further splits."""
    run_dir = RunDir(path)
    counts = {"train": train, "validation": validation, **others}
    used = {name: images for name, images in counts.items() if images}
    make_dataset(run_dir.dataset(DATASET), used, classes=classes)
    return run_dir


def prepared(path: Path, train: int = TRAIN, validation: int = VALIDATION) -> Path:
    """``prepared_run`` as a path."""
    return prepared_run(path, train, validation).path


def with_weights(path: Path, **changes: Any) -> dict[str, torch.Tensor]:
    """Write untrained weights as the result of the stage 'finetune'.

    Their gammas are large enough for every block to matter. ``changes`` override the model's
    settings.
    """
    torch.manual_seed(5)
    options = {key: value for key, value in MODEL.items() if key != "drop_path"}
    network = build(**options | {"num_classes": CLASSES} | changes)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if name.endswith("gamma"):
                parameter.fill_(0.3)
            if name.startswith("classifiers"):
                parameter.normal_()
    state = {
        name: value.detach().clone()
        for name, value in network.state_dict().items()
        if value.is_floating_point()
    }
    weights_file = RunDir(path).weights("finetune")
    weights_file.parent.mkdir(parents=True)
    save_file(state, weights_file)
    description = WeightsDescription(image_size=64, preprocessing="fast", metrics={"top1": 0.5})
    description.write(weights_file.parent)
    return state


def train(
    job: Job, stage: str, run_dir: RunDir, stop: Callable[[], bool] = lambda: False
) -> dict[str, float]:
    """Run a training stage. Called in each process of a group."""
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False
    return train_stage(job, stage, run_dir, DistEnv.from_environment(), RankLink(stop))


def evaluate(job: Job, run_dir: RunDir) -> dict[str, float]:
    """Run the evaluate stage. Called in each process of a group."""
    return evaluate_stage(job, run_dir, DistEnv.from_environment(), RankLink())


def run_stage(
    run_dir: RunDir,
    world_size: int,
    job: Job,
    stage: str = "pretrain",
    stop: Callable[[], bool] | None = None,
) -> list[Any]:
    """Run a training stage with ``world_size`` processes; what each rank returned or raised."""
    arguments = (job, stage, run_dir) if stop is None else (job, stage, run_dir, stop)
    return processes.run(run_dir.logs / "output", world_size, train, *arguments)


class StopAfter:
    """Requests a stop after ``steps`` steps, on one rank."""

    def __init__(self, steps: int, rank: int) -> None:
        self.steps = steps
        self.rank = rank

    def __call__(self) -> bool:
        self.steps -= 1
        return self.steps <= 0 and os.environ["RANK"] == str(self.rank)


def weights(run_dir: RunDir, stage: str = "pretrain") -> dict[str, torch.Tensor]:
    """The weights that a stage produced."""
    return load_file(run_dir.weights(stage))


def events(run_dir: RunDir, kind: str, stage: str = "pretrain") -> list[Event]:
    return [event for event in read_events(run_dir.events(stage)) if event.kind == kind]


def scalars(run_dir: RunDir, tag: str, stage: str = "pretrain") -> list[float]:
    """The values of a metric, one per logged step."""
    return [event.scalars[tag] for event in events(run_dir, "step", stage)]


def losses(run_dir: RunDir, stage: str = "pretrain") -> dict[int, float]:
    """Training loss by step."""
    return {event.step: event.scalars[tags.LOSS] for event in events(run_dir, "step", stage)}


def messages(run_dir: RunDir, stage: str = "pretrain") -> str:
    """All log messages of a stage, one line per message: ``level: text``."""
    return "\n".join(f"{event.level}: {event.text}" for event in events(run_dir, "message", stage))


def assert_same_weights(a: RunDir, b: RunDir, stage: str = "pretrain") -> None:
    """Both runs produced bit-equal weights."""
    weights_a = weights(a, stage)
    weights_b = weights(b, stage)
    assert set(weights_a) == set(weights_b)
    for name, value in weights_a.items():
        assert torch.equal(weights_b[name], value), name
