"""Top-1 and top-5 of a stage's weights on every validation image exactly once."""

from __future__ import annotations

import math
from pathlib import Path

import torch
import torch.distributed as dist

from pipeline.config import resolve
from pipeline.config.schema import Job
from pipeline.data.device import DeviceAugment
from pipeline.data.format import open_dataset
from pipeline.data.loader import EvalLoader
from pipeline.errors import ConfigError
from pipeline.model import Network
from pipeline.train.build import initial_weights, network_spec
from pipeline.train.engine import setup_process
from pipeline.train.validate import validate
from pipeline.train.world import World


def load_network(job: Job, run_dir: Path, stage: str, num_classes: int) -> Network:
    """The plain fp32 network (stored activations) of a training stage, with its weights (the EMA where there is one)."""
    reader = initial_weights(run_dir, stage)
    with torch.device("meta"):
        network = Network(network_spec(job, resolve.train_config(job, stage), num_classes, "stored"))
    network.load_state_dict({name: reader.full(name) for name in reader.shapes}, strict=True, assign=True)
    return network.eval()


def evaluate_stage(job: Job, run_dir: Path, world: World) -> dict[str, float]:
    """Figures ``top1``, ``top5`` (shares), ``loss``, ``images``: of the whole validation split, for any number of processes."""
    stage = job.stages.evaluate
    if stage is None:
        raise ConfigError("the job has no stage 'evaluate'", remedy="add it under `stages`")
    device = setup_process(world, resolve.device(job.cluster) == "cuda", resolve.threads(job.cluster))
    try:
        data = open_dataset(run_dir / "stages" / "prepare" / resolve.dataset_name(job, "evaluate"))
        split, config = data.split("validation"), resolve.train_config(job, stage.initial)
        network = load_network(job, run_dir, stage.initial, len(data.classes)).to(device)
        loader = EvalLoader(
            split, image_size=resolve.evaluate_image_size(job), resize=config.eval_resize, batch=stage.batch,
            rank=world.rank, world_size=world.size, threads=resolve.loader_threads(job.cluster),
        )  # fmt: skip
        normalise = DeviceAugment(config.augment, len(data.classes), job.seed, train=False)
        forwards = math.ceil(math.ceil(len(split) / world.size) / stage.batch)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda" and config.precision == "bf16"):
            accuracy = validate(network, loader, normalise, device, forwards)
        return {"top1": accuracy.top1, "top5": accuracy.top5, "loss": accuracy.loss, "images": float(accuracy.images)}
    finally:
        dist.destroy_process_group()
