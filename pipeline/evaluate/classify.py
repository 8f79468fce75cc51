"""The evaluate stage: accuracy and loss of a stage's weights on the reported split."""

from __future__ import annotations

import torch

from pipeline.checkpoint.description import WeightsDescription
from pipeline.checkpoint.weights import weights_of
from pipeline.config import job_queries, machine
from pipeline.config.render import plain_job_file
from pipeline.config.schema import AugmentConfig, Job
from pipeline.data.dataset import PreparedDataset
from pipeline.data.device import DeviceAugment
from pipeline.data.job_dataset import open_job_dataset
from pipeline.data.loader import EvalLoader
from pipeline.errors import ConfigError
from pipeline.evaluate.accuracy import Evaluation, validate
from pipeline.evaluate.metrics import COMPARED, tagged
from pipeline.evaluate.network import labelled_for, load_network, preprocessing
from pipeline.evaluate.pictures import record_samples
from pipeline.evaluate.record import EvaluationRecord
from pipeline.layout import RunDir
from pipeline.monitor.goodput import EVALUATION
from pipeline.monitor.recorder import Recorder
from pipeline.runtime.device_memory import out_of_memory_named
from pipeline.runtime.dist_env import DistEnv
from pipeline.runtime.process_group import process_group
from pipeline.runtime.rank_link import RankLink


def evaluate_stage(job: Job, run_dir: RunDir, world: DistEnv, link: RankLink) -> dict[str, float]:
    """Evaluate on every image of the reported split exactly once, for any number of processes.

    The reported split is test, or validation if the dataset has no test split.

    Returns:
        Every metric of ``evaluate/metrics.py`` over the whole split, and the number of its images
        under the name of the split: ``validation_images`` or ``test_images``.
    """
    stage = job.stages.evaluate
    if stage is None:
        raise ConfigError("the job has no stage 'evaluate'", remedy="add it under `stages`")
    with process_group(world, job.cluster) as device:
        data = open_job_dataset(job, run_dir, "evaluate")
        split = data.description.reported_split()
        prepared = preprocessing(
            job, run_dir, stage.initial, image_size=stage.image_size, mode=stage.preprocessing
        )
        network = load_network(job, run_dir, stage.initial, data).to(device)
        # On a GPU, evaluate in the precision of the training; on the CPU always in fp32.
        weights = weights_of(run_dir, stage.initial)
        description = WeightsDescription.read(*weights)
        use_bf16 = device.type == "cuda" and description.precision == "bf16"
        normalise = DeviceAugment(AugmentConfig(), len(data.classes), job.seed, train=False)
        with (
            out_of_memory_named("stages.evaluate.batch", stage.batch, "take a smaller batch"),
            EvalLoader(
                labelled_for(description.classes, data, split),
                preprocessing=prepared,
                batch=stage.batch,
                rank=world.rank,
                world_size=world.size,
                threads=machine.loader_threads(job.cluster, world.local_size),
                pin_memory=device.type == "cuda",
            ) as loader,
            torch.autocast(device.type, torch.bfloat16, enabled=use_bf16),
        ):
            evaluation = validate(
                network, loader, normalise, device, on_batch=lambda: link.beat(0, EVALUATION)
            )
    if world.is_main:
        record = EvaluationRecord(
            split=split,
            images=evaluation.images,
            weights=weights.digest(),
            preprocessing=prepared.mode,
            image_size=prepared.image_size,
            metrics=evaluation.metrics,
        )
        record.write(run_dir)
        class_names = _class_names(description.classes, data)
        step = description.step or 0
        _show(job, run_dir, evaluation, split=split, step=step, class_names=class_names)
    return {**evaluation.metrics, f"{split}_images": float(evaluation.images)}


def _show(
    job: Job,
    run_dir: RunDir,
    evaluation: Evaluation,
    *,
    split: str,
    step: int,
    class_names: list[str],
) -> None:
    """Show the result in TensorBoard. ``step``: of the weights."""
    recorder = Recorder(run_dir, "evaluate", trained=job_queries.training_stages(job))
    recorder.job(plain_job_file(job))
    recorder.evaluation(step, tagged(split, evaluation.metrics))
    if evaluation.samples is not None:
        record_samples(recorder, step, evaluation.samples, class_names)
    recorder.hparams(_hyperparameters(job), COMPARED)
    recorder.close()


def _class_names(model_classes: list[str] | None, data: PreparedDataset) -> list[str]:
    """The names of the model's outputs; the ID of a class that the dataset does not have."""
    names = dict(zip(data.classes, data.class_names, strict=True))
    return [names.get(entry, entry) for entry in model_classes or data.classes]


def _hyperparameters(job: Job) -> dict[str, str | float | bool]:
    """Those of the training whose weights are evaluated; of a weights file they are not known."""
    source = job_queries.source_stage(job, "evaluate")
    trained = source in job_queries.stage_names(job)
    return job_queries.hyperparameters(job, source) if trained else {}
