"""The evaluate stage: accuracy and loss of a stage's weights on the reported split."""

from __future__ import annotations

import torch

from pipeline.checkpoint.description import WeightsDescription
from pipeline.checkpoint.weights import weights_path
from pipeline.config import job_queries, machine
from pipeline.config.schema import AugmentConfig, Job
from pipeline.data.dataset import open_dataset
from pipeline.data.device import DeviceAugment
from pipeline.data.loader import EvalLoader
from pipeline.errors import ConfigError
from pipeline.evaluate.accuracy import validate
from pipeline.evaluate.metrics import LOSS
from pipeline.evaluate.network import labelled_for, load_network, preprocessing
from pipeline.evaluate.record import EvaluationRecord
from pipeline.files import file_digest
from pipeline.layout import RunDir
from pipeline.monitor import tags
from pipeline.monitor.recorder import Recorder
from pipeline.runtime.device_memory import out_of_memory_named
from pipeline.runtime.dist_env import DistEnv
from pipeline.runtime.process_group import process_group


def evaluate_stage(job: Job, run_dir: RunDir, world: DistEnv) -> dict[str, float]:
    """Evaluate on every image of the reported split exactly once, for any number of processes.

    The reported split is test, or validation if the dataset has no test split.

    Returns:
        Every metric of ``evaluate/metrics.py`` over the whole split, and the number of its images
        under the name of the split: ``validation_images`` or ``test_images``.
    """
    stage = job.stages.evaluate
    if stage is None:
        raise ConfigError("the job has no stage 'evaluate'", remedy="add it under `stages`")
    use_cuda = machine.device(job.cluster) == "cuda"
    with process_group(world, use_cuda, machine.threads(job.cluster)) as device:
        data = open_dataset(run_dir.dataset(job_queries.dataset_name(job, "evaluate")))
        split = data.description.reported_split()
        image_size, resize = preprocessing(job, run_dir, stage.initial, stage.image_size)
        network = load_network(job, run_dir, stage.initial, data).to(device)
        # On a GPU, evaluate in the precision of the training; on the CPU always in fp32.
        weights = weights_path(run_dir, stage.initial)
        description = WeightsDescription.read(weights)
        use_bf16 = device.type == "cuda" and description.precision == "bf16"
        normalise = DeviceAugment(AugmentConfig(), len(data.classes), job.seed, train=False)
        with (
            out_of_memory_named("stages.evaluate.batch", stage.batch, "take a smaller batch"),
            EvalLoader(
                labelled_for(description.classes, data, split),
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
    if world.is_main:
        record = EvaluationRecord(
            split=split,
            images=evaluation.images,
            weights=file_digest(weights),
            metrics=evaluation.metrics,
        )
        record.write(run_dir)
        _show(record, run_dir, description.step or 0)
    return {**evaluation.metrics, f"{split}_images": float(evaluation.images)}


def _show(record: EvaluationRecord, run_dir: RunDir, step: int) -> None:
    """Write the metrics to TensorBoard, under the name of the split."""
    # The charts of training are those of the validation split and have no prefix.
    prefix = "" if record.split == "validation" else f"{record.split}_"
    scalars = {
        f"loss/{record.split}" if name == LOSS else tags.accuracy(f"{prefix}{name}"): value
        for name, value in record.metrics.items()
    }
    recorder = Recorder(run_dir, "evaluate")
    recorder.evaluation(step, scalars)
    recorder.close()
