"""Top-1 and top-5 of a stage's weights on every validation image exactly once."""

from __future__ import annotations

from pathlib import Path

import torch

from pipeline.config import resolve
from pipeline.config.schema import AugmentConfig, Job
from pipeline.data.device import DeviceAugment
from pipeline.data.format import open_dataset
from pipeline.data.loader import EvalLoader
from pipeline.errors import ConfigError
from pipeline.evaluate.network import load_network, preprocessing
from pipeline.train.build import describe, weights_path
from pipeline.train.group import process_group
from pipeline.train.validate import validate
from pipeline.train.world import World


def evaluate_stage(job: Job, run_dir: Path, world: World) -> dict[str, float]:
    """Figures ``top1``, ``top5`` (shares), ``loss``, ``images``: of the whole validation split, for any number of processes."""
    stage = job.stages.evaluate
    if stage is None:
        raise ConfigError("the job has no stage 'evaluate'", remedy="add it under `stages`")
    with process_group(world, resolve.device(job.cluster) == "cuda", resolve.threads(job.cluster)) as device:
        data = open_dataset(run_dir / "stages" / "prepare" / resolve.dataset_name(job, "evaluate"))
        image_size, resize = preprocessing(job, run_dir, stage.initial, stage.image_size)
        network = load_network(job, run_dir, stage.initial, data).to(device)
        half = device.type == "cuda" and describe(weights_path(run_dir, stage.initial)).get("precision") == "bf16"
        normalise = DeviceAugment(AugmentConfig(), len(data.classes), job.seed, train=False)
        with (
            EvalLoader(
                data.split("validation"), image_size=image_size, resize=resize, batch=stage.batch,
                rank=world.rank, world_size=world.size, threads=resolve.loader_threads(job.cluster),
            ) as loader,
            torch.autocast(device.type, torch.bfloat16, enabled=half),
        ):  # fmt: skip
            accuracy = validate(network, loader, normalise, device, image_size)
    return {"top1": accuracy.top1, "top5": accuracy.top5, "loss": accuracy.loss, "images": float(accuracy.images)}
