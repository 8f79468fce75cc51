"""Run directories with small prepared datasets, and stages run in them by groups of processes."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from pipeline.config.schema import Job
from pipeline.evaluate.classify import evaluate_stage
from pipeline.files import write_json
from pipeline.layout import RunDir
from pipeline.model import build
from pipeline.monitor.events import Event, read_events
from pipeline.runtime.dist_env import DistEnv
from pipeline.train.trainer import train_stage
from tests.data.small_datasets import make_dataset

CLASSES = 6
TRAIN, VALIDATION = 67, 23  # 4 steps an epoch; a prime number of validation images
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
            "data": {"set": {"root": "x"}},
            "stages": stages,
        }
    )


def prepared(run_dir: Path, train: int = TRAIN, validation: int = VALIDATION) -> Path:
    """A run's directory in which the stage 'prepare' is done."""
    make_dataset(
        run_dir / "stages" / "prepare" / "set",
        {"train": train, "validation": validation},
        classes=CLASSES,
    )
    return run_dir


def with_weights(run_dir: Path, **changes: Any) -> dict[str, torch.Tensor]:
    """Put untrained weights where the stage 'finetune' would, with gammas that let every block matter."""
    torch.manual_seed(5)
    options = {key: value for key, value in MODEL.items() if key != "drop_path"}
    network = build(**options | {"num_classes": CLASSES} | changes)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if name.endswith("gamma"):
                parameter.fill_(0.3)
            if name.startswith("classifiers"):
                parameter.normal_()
    state = {name: value.detach().clone() for name, value in network.state_dict().items()}
    folder = run_dir / "stages" / "finetune"
    folder.mkdir(parents=True)
    save_file(state, folder / "weights.safetensors")
    write_json(
        folder / "weights.json", {"image_size": 64, "resize": 1.143, "figures": {"top1": 0.5}}
    )
    return state


def train(
    job: Job, stage: str, run_dir: Path, stop: Callable[[], bool] = lambda: False
) -> dict[str, float]:
    """Called in each process of a group."""
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False
    return train_stage(job, stage, RunDir(run_dir), DistEnv.from_environment(), stop)


def evaluate(job: Job, run_dir: Path) -> dict[str, float]:
    """Called in each process of a group."""
    return evaluate_stage(job, RunDir(run_dir), DistEnv.from_environment())


class StopAfter:
    """Wants to stop after so many steps, on one rank."""

    def __init__(self, steps: int, rank: int) -> None:
        self.steps, self.rank = steps, rank

    def __call__(self) -> bool:
        self.steps -= 1
        return self.steps <= 0 and os.environ["RANK"] == str(self.rank)


def weights(run_dir: Path, stage: str = "pretrain") -> dict[str, torch.Tensor]:
    return load_file(run_dir / "stages" / stage / "weights.safetensors")


def events(run_dir: Path, kind: str, stage: str = "pretrain") -> list[Event]:
    return [event for event in read_events(RunDir(run_dir).events(stage)) if event.kind == kind]


def losses(run_dir: Path, stage: str = "pretrain") -> dict[int, float]:
    return {event.step: event.scalars["loss/total"] for event in events(run_dir, "step", stage)}


def messages(run_dir: Path, stage: str = "pretrain") -> str:
    return "\n".join(f"{event.level}: {event.text}" for event in events(run_dir, "message", stage))
