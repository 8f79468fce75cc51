"""Construction of a training stage: network, engine, restored state and everything a step needs."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from pipeline.checkpoint.description import WeightsDescription
from pipeline.checkpoint.weights import initial_weights, weights_of
from pipeline.config import job_queries, machine
from pipeline.config.job_queries import TRAINING
from pipeline.config.render import plain_job_file
from pipeline.config.schema import TrainConfig
from pipeline.data.device import DeviceAugment
from pipeline.data.loader import TrainLoader
from pipeline.data.order import order_of
from pipeline.model import NetworkSpec
from pipeline.monitor.recorder import Recorder
from pipeline.monitor.trained_on import TrainedOn
from pipeline.optimizers import registry
from pipeline.train.checkpointing import load_initial, restore
from pipeline.train.context import StageContext, StageLog, StepContext
from pipeline.train.engine import DeepSpeedEngine, make_engine
from pipeline.train.engine_hooks import judge_updates
from pipeline.train.guard import Guard
from pipeline.train.loss_scale import LossScale
from pipeline.train.metrics import Metrics
from pipeline.train.network_spec import training_spec
from pipeline.train.offload import allocator
from pipeline.train.schedule import Schedule
from pipeline.train.selection import Selection, selection_of
from pipeline.train.self_check import SelfCheck
from pipeline.train.step import TrainingStep
from pipeline.train.training_state import MetricsHistory, TrainingState
from pipeline.train.zero_state import ShardedState


@dataclass(frozen=True, kw_only=True)
class StageSetup:
    """A training stage, ready to run."""

    spec: NetworkSpec
    step: TrainingStep
    history: MetricsHistory
    selection: Selection | None  # of the weights to keep; None: the last ones
    first_step: int  # 0-based: the steps that a checkpoint has done already
    resumed: bool  # from a checkpoint of this stage
    replaced_samples: int  # until the checkpoint

    @property
    def first_data_step(self) -> int:
        """The step of the data to begin with: later by the images that the guard leaves out."""
        return self.first_step + self.step.context.guard.state.shift


def set_up(context: StageContext, log: StageLog) -> StageSetup:
    """Build everything that the training loop needs. Collective.

    Raises:
        CheckpointError: a checkpoint or initial weights cannot be used.
    """
    # 1. The network under DeepSpeed, with random weights, and the parts of a step.
    selection = selection_of(context, log)
    spec, step = build(context, log, with_best=selection is not None)
    sharded = step.context.state
    # 2. The weights of a checkpoint or of another stage.
    restored = restore(context.checkpoints, sharded, context.identity(spec), log)
    attach_recorder(context, log, restored.step if restored else 0)
    if restored is not None:
        log(f"resuming from step {restored.step}")
    else:
        _load_initial(context, sharded, log)
    # 3. The counts of the checkpoint.
    history = MetricsHistory()
    if restored is not None:
        continue_from(restored.state, step, history)
    return StageSetup(
        spec=spec,
        step=step,
        history=history,
        selection=selection,
        first_step=restored.step if restored else 0,
        resumed=restored is not None,
        replaced_samples=restored.state.replaced_samples if restored else 0,
    )


def build(
    context: StageContext, log: StageLog, *, with_best: bool
) -> tuple[NetworkSpec, TrainingStep]:
    """The network with random weights under DeepSpeed, and its training step. Collective."""
    config = context.config
    micro_batch, accumulation = job_queries.batches(config, context.dist_env.size)
    spec = training_spec(context.job, config, context.num_classes)
    engine = make_engine(
        spec,
        config,
        context.dist_env,
        micro_batch=micro_batch,
        seed=context.job.seed,
        device=context.device,
    )
    positions = len(spec.supervised_columns)
    metrics = Metrics(positions, positions - 1, context.device)
    images = len(context.data.split("train"))
    steps_per_epoch = job_queries.steps_per_epoch(config, images)
    guard = Guard(config.guard, context.device, steps_per_epoch=steps_per_epoch)
    judge_updates(engine, guard.refuses)
    step = TrainingStep(
        context=StepContext(
            engine=engine,
            state=_sharded_state(engine, config, with_best=with_best),
            schedule=Schedule.of(config, images),
            device_augment=DeviceAugment(
                config.augment, context.num_classes, context.job.seed, train=True
            ),
            metrics=metrics,
            self_check=SelfCheck(engine.module, config.on_mismatch, context.device),
            guard=guard,
            loss_scale=LossScale(engine),
            seed=context.job.seed,
            ema_decay=config.ema_decay,
            log_every_steps=config.log_every_steps,
            device=context.device,
            log=log,
        ),
        accumulation=accumulation,
    )
    return spec, step


def continue_from(state: TrainingState, step: TrainingStep, history: MetricsHistory) -> None:
    """Continue with the state of a checkpoint whose tensors are loaded."""
    context = step.context
    if state.metric_sums is not None:
        context.metrics.restore(state.metric_sums)
    context.loss_scale.restore(state.loss_scale)
    context.guard.state = state.guard
    step.applied_steps = state.applied_steps
    step.retried_steps = state.retried_steps
    history.evaluations = list(state.evaluations)
    history.last_metrics = state.last_metrics


def _sharded_state(
    engine: DeepSpeedEngine, config: TrainConfig, *, with_best: bool
) -> ShardedState:
    return ShardedState(
        engine,
        moments=registry.kind(config.optimizer).moments,
        with_ema=bool(config.ema_decay),
        with_best=with_best,
        allocate=allocator(config.offload_optimizer),
    )


def attach_recorder(context: StageContext, log: StageLog, resume_step: int) -> None:
    """Open the stage's event log on rank 0, at the step that training resumes from."""
    if context.dist_env.is_main:
        recorder = Recorder(
            context.run_dir,
            context.stage,
            trained=job_queries.training_stages(context.job),
            resume_step=resume_step,
            trained_on=_trained_on(context),
        )
        recorder.job(plain_job_file(context.job))
        log.attach(recorder)


def _trained_on(context: StageContext) -> TrainedOn:
    micro_batch, _ = job_queries.batches(context.config, context.dist_env.size)
    on_gpu = context.device.type == "cuda"
    return TrainedOn(
        device=torch.cuda.get_device_name(context.device) if on_gpu else "cpu",
        processes=context.dist_env.size,
        threads=torch.get_num_threads(),
        micro_batch=micro_batch,
        classes=context.num_classes,
        images=len(context.data.split("train")),
    )


def _load_initial(context: StageContext, sharded: ShardedState, log: StageLog) -> None:
    """Load the weights that the stage starts `from`, if it names any."""
    initial = context.config.initial
    if initial:
        weights = initial_weights(context.run_dir, initial)
        # A stage of the job hands on its backbone. Weights from elsewhere keep a head that fits.
        same_classes = False
        if initial not in TRAINING:
            source = weights_of(context.run_dir, initial)
            same_classes = WeightsDescription.read(*source).classes == context.data.classes
        load_initial(weights, sharded, initial, log, with_classifier=same_classes)
    elif context.stage == "finetune":
        log("`from` names no weights: fine-tuning starts from scratch", "warning")


def train_loader(context: StageContext, first_step: int) -> TrainLoader:
    """The training batches of this rank, from ``first_step`` (0-based) on.

    Raises:
        DataError: the training split has fewer images than one global batch.
    """
    config = context.config
    micro_batch, _ = job_queries.batches(config, context.dist_env.size)
    return TrainLoader(
        context.data.split("train"),
        seed=context.job.seed,
        image_size=config.image_size,
        augment=config.augment,
        global_batch=config.global_batch,
        micro_batch=micro_batch,
        rank=context.dist_env.rank,
        world_size=context.dist_env.size,
        threads=machine.loader_threads(context.job.cluster, context.dist_env.local_size),
        start_step=first_step,
        order=order_of(config, context.data, context.job.seed),
        on_bad_sample=config.on_bad_sample,
        prefetch_bytes=context.job.cluster.prefetch_mib << 20,
        pin_memory=context.device.type == "cuda",
    )
