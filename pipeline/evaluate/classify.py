"""The evaluate stage: accuracy and loss of a stage's weights."""

from __future__ import annotations

import torch

from pipeline.checkpoint.weights import WeightsDescription, weights_path
from pipeline.config import job_queries, machine
from pipeline.config.schema import AugmentConfig, Job
from pipeline.data.dataset import open_dataset
from pipeline.data.device import DeviceAugment
from pipeline.data.loader import EvalLoader
from pipeline.errors import ConfigError
from pipeline.evaluate.accuracy import validate
from pipeline.evaluate.network import load_network, preprocessing
from pipeline.layout import RunDir
from pipeline.runtime.device_memory import out_of_memory_named
from pipeline.runtime.dist_env import DistEnv
from pipeline.runtime.process_group import process_group


def evaluate_stage(job: Job, run_dir: RunDir, world: DistEnv) -> dict[str, float]:
    """Evaluate on every validation image exactly once, for any number of processes.

    Returns:
        Every metric of ``evaluate/metrics.py`` over the whole validation split, and ``images``.
    """
    stage = job.stages.evaluate
    if stage is None:
        raise ConfigError("the job has no stage 'evaluate'", remedy="add it under `stages`")
    use_cuda = machine.device(job.cluster) == "cuda"
    with process_group(world, use_cuda, machine.threads(job.cluster)) as device:
        data = open_dataset(run_dir.dataset(job_queries.dataset_name(job, "evaluate")))
        image_size, resize = preprocessing(job, run_dir, stage.initial, stage.image_size)
        network = load_network(job, run_dir, stage.initial, data).to(device)
        # On a GPU, evaluate in the precision of the training; on the CPU always in fp32.
        description = WeightsDescription.read(weights_path(run_dir, stage.initial))
        use_bf16 = device.type == "cuda" and description.precision == "bf16"
        normalise = DeviceAugment(AugmentConfig(), len(data.classes), job.seed, train=False)
        with (
            out_of_memory_named("stages.evaluate.batch", stage.batch, "take a smaller batch"),
            EvalLoader(
                data.split("validation"),
                image_size=image_size,
                resize=resize,
                batch=stage.batch,
                rank=world.rank,
                world_size=world.size,
                threads=machine.loader_threads(job.cluster),
                pin_memory=device.type == "cuda",
            ) as loader,
            torch.autocast(device.type, torch.bfloat16, enabled=use_bf16),
        ):
            evaluation = validate(network, loader, normalise, device, image_size)
    return {**evaluation.metrics, "images": float(evaluation.images)}
