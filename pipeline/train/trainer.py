"""A training stage in one process (of one or many): what the Ray actors call and what ``python -m pipeline train`` runs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import torch

from pipeline.checkpoint.manifest import directory_of
from pipeline.checkpoint.weights import initial_weights
from pipeline.config import job_queries, machine
from pipeline.config.schema import Job, TrainConfig, hparam_keys
from pipeline.data.dataset import PreparedDataset, open_dataset
from pipeline.data.device import DeviceAugment
from pipeline.data.loader import EvalLoader, TrainLoader
from pipeline.data.order import order_of
from pipeline.errors import CheckpointError, Interrupted
from pipeline.evaluate.accuracy import picture_rows, validate
from pipeline.layout import RunDir
from pipeline.model import NetworkSpec
from pipeline.monitor.recorder import Recorder
from pipeline.runtime.dist_env import DistEnv
from pipeline.runtime.process_group import process_group
from pipeline.train.checkpointing import load_initial, restore, save_checkpoint, write_weights
from pipeline.train.engine import make_engine
from pipeline.train.metrics import Metrics
from pipeline.train.network_spec import network_spec
from pipeline.train.preemption import CollectiveStop
from pipeline.train.replaced_samples import ReplacedSamples
from pipeline.train.schedule import Schedule
from pipeline.train.self_check import SelfCheck
from pipeline.train.step import TrainingStep
from pipeline.train.throughput import Throughput
from pipeline.train.zero_state import ShardedState


@dataclass
class Trainer:
    """One training stage under way."""

    job: Job
    stage: str
    config: TrainConfig
    run_dir: RunDir
    world: DistEnv
    device: torch.device
    data: PreparedDataset
    recorder: Recorder | None = None  # on rank 0
    history: list[dict[str, float]] = field(default_factory=list)  # one entry an evaluation
    figures: dict[str, float] = field(default_factory=dict)  # of the newest log
    unsaid: list[tuple[str, str]] = field(
        default_factory=list
    )  # messages from before the recorder was there

    @property
    def checkpoints(self) -> Path:
        return self.run_dir.checkpoints(self.stage)

    @property
    def total_steps(self) -> int:
        return job_queries.steps(self.config, len(self.data.split("train")))

    def log(self, text: str, level: str = "info") -> None:
        """A message in the stage's events (from rank 0)."""
        if not self.world.is_main:
            return
        self.unsaid.append((text, level))
        if self.recorder is not None:
            for message in self.unsaid:
                self.recorder.message(*message)
            self.unsaid.clear()

    def may_commit(self) -> bool:
        """Whether this group of processes is still the current one (a replaced one may live on for a while)."""
        if self.world.generation is None:
            return True
        path = self.run_dir.fence(self.stage)
        return not path.exists() or path.read_text().strip() == str(self.world.generation)

    def identity(self, spec: NetworkSpec) -> dict[str, Any]:
        """What a checkpoint must agree with."""
        return {
            "network": spec.architecture,
            "data": self.data.fingerprint,
            "order": [
                self.config.order,
                self.config.window_shards,
                self.config.repeated_augmentation,
                self.config.balance,
            ],
            "seed": self.job.seed,
            "global_batch": self.config.global_batch,
            "total_steps": self.total_steps,
        }


def train_stage(
    job: Job, stage: str, run_dir: RunDir, world: DistEnv, stop: Callable[[], bool]
) -> dict[str, float]:
    """Trainer (or go on with) a training stage.

    Args:
        stage: 'pretrain' or 'finetune'.
        stop: asked once a step on every rank; when true on any, all write a checkpoint and raise ``Interrupted``.

    Returns:
        Figures: loss, images_per_s, data_wait_share of the last log; top1, top5 of the last evaluation; steps.
    """
    config = job_queries.train_config(job, stage)
    with process_group(
        world, machine.device(job.cluster) == "cuda", machine.threads(job.cluster)
    ) as device:
        prepared = run_dir.dataset(job_queries.dataset_name(job, stage))
        data = open_dataset(prepared, whole=config.on_bad_sample == "stop")
        run = Trainer(job, stage, config, run_dir, world, device, data)
        try:
            return _train(run, stop)
        finally:
            if run.recorder is not None:
                run.recorder.close()


def _train(run: Trainer, stop: Callable[[], bool]) -> dict[str, float]:
    job, config, world, device = run.job, run.config, run.world, run.device
    micro, accumulation = job_queries.batches(config, world.size)
    spec = network_spec(job, config, len(run.data.classes))
    engine = make_engine(spec, config, world, micro, job.seed, device)
    masters = ShardedState(engine, config.ema_decay)
    manifest = restore(run.checkpoints, masters, run.identity(spec), run.log)
    start = manifest.step if manifest else 0
    if world.is_main:
        run.recorder = Recorder(run.run_dir, run.stage, resume_step=start)
    if manifest:
        run.history, run.figures = manifest.state["history"], manifest.state["figures"]
        run.log(f"going on from step {start}")
    elif config.initial:
        load_initial(initial_weights(run.run_dir, config.initial), masters, config.initial, run.log)
    elif run.stage == "finetune":
        run.log("no weights are named by `from`: fine-tuning starts from scratch", "warning")
    positions = len(spec.supervised_columns)
    metrics = Metrics(positions, positions - 1, device)
    if manifest:
        metrics.restore(**manifest.state["metrics"])
    augment = DeviceAugment(config.augment, len(run.data.classes), job.seed, train=True)
    schedule = Schedule.of(config, len(run.data.split("train")))
    counts = (
        {"applied": manifest.state["optimizer_steps"], "repeated": manifest.state["repeated_steps"]}
        if manifest
        else {}
    )
    stepper = TrainingStep(
        engine,
        masters,
        schedule,
        augment,
        metrics,
        SelfCheck(engine.module, config.on_mismatch),
        job.seed,
        accumulation,
        device,
        config.log_every_steps,
        run.log,
        **counts,
    )
    if (
        manifest is None or start < run.total_steps
    ):  # of a dataset without one whole batch the loader tells
        with TrainLoader(
            run.data.split("train"),
            seed=job.seed,
            image_size=config.image_size,
            augment=config.augment,
            global_batch=config.global_batch,
            micro_batch=micro,
            rank=world.rank,
            world_size=world.size,
            threads=machine.loader_threads(job.cluster),
            start_step=start,
            order=order_of(config, run.data, job.seed),
            on_bad_sample=config.on_bad_sample,
            prefetch_bytes=job.cluster.prefetch_mib << 20,
        ) as loader:
            replaced = ReplacedSamples(
                loader, manifest.state.get("replaced_samples", 0) if manifest else 0, device
            )
            _loop(run, stepper, loader, replaced, start, CollectiveStop(stop))
    return _finish(run, spec)


def _finish(run: Trainer, spec: NetworkSpec) -> dict[str, float]:
    """Write the stage's result, from its last checkpoint."""
    config, last = run.config, run.history[-1]
    figures = {
        **run.figures,
        "top1": last["top1"],
        "top5": last["top5"],
        "steps": float(run.total_steps),
    }
    facts = {
        "classes": run.data.classes,
        "image_size": config.image_size,
        "resize": config.eval_resize,
        "precision": config.precision,
        "data": run.data.fingerprint,
        "figures": figures,
    }
    write_weights(
        run.run_dir.stage(run.stage), directory_of(run.checkpoints, run.total_steps), spec, facts
    )
    if run.recorder is not None:
        settings: dict[str, str | float | bool] = {
            key: getattr(config, key) for key in hparam_keys(TrainConfig)
        }
        settings |= {
            "channels": str(spec.channels),
            "columns": spec.columns,
            "drop_path": spec.drop_path,
        }
        run.recorder.hparams(settings, {key: figures[key] for key in ("top1", "loss")})
    return figures


def _loop(
    run: Trainer,
    stepper: TrainingStep,
    loader: TrainLoader,
    replaced: ReplacedSamples,
    start: int,
    agreement: CollectiveStop,
) -> None:
    config, total, per_epoch = run.config, run.total_steps, loader.steps_per_epoch
    evaluate_every = max(1, round(config.eval_every_epochs * per_epoch))
    checkpoint_every = config.checkpoint_every_steps or per_epoch
    throughput = Throughput(loader, start)
    stepper.set_widths()
    for step in range(start, total):
        stepper.engine.train()
        stepper.run(step, loader)
        done, last = step + 1, step + 1 == total
        if done % config.log_every_steps == 0 or last:
            _log(run, stepper, throughput, replaced, done, per_epoch)
            stepper.set_widths()
        if done % evaluate_every == 0 or last:
            with throughput.paused():
                run.history.append(_evaluate(run, stepper, done))
        stopping = agreement.after_step() and not last
        if done % checkpoint_every == 0 or last or stopping:
            with throughput.paused():
                _checkpoint(run, stepper, replaced, done, last)
        if stopping:
            agreement.close()
            raise Interrupted(
                f"{run.stage} stopped after step {done} of {total}",
                remedy="the same command goes on from there",
            )
    agreement.close()


def _log(
    run: Trainer,
    stepper: TrainingStep,
    throughput: Throughput,
    replaced: ReplacedSamples,
    done: int,
    per_epoch: int,
) -> None:
    scalars = stepper.metrics.read()
    largest, findings = stepper.integrity.summary(scalars["reversible/mismatched_elements"] > 0)
    for finding in findings:
        run.log(f"up to step {done}, trained regardless (on_mismatch: warn): {finding}", "warning")
    replaced_samples = replaced.count()
    for reason in replaced.new_reasons():
        run.log(
            f"up to step {done}, another image in its place (on_bad_sample: replace): {reason}",
            "warning",
        )
    scalars |= {
        "optim/lr": stepper.schedule(done - 1),
        "optim/skipped_steps": float(done - stepper.applied),
        "reversible/repeated_steps": float(stepper.repeated),
        "reversible/largest_value": largest,
        "data/replaced_samples": float(replaced_samples),
        "memory/rss_mib": psutil.Process().memory_info().rss / 2**20,
        **throughput.rates(done),
    }
    norm = stepper.engine.get_global_grad_norm()
    if norm is not None:
        scalars["optim/grad_norm"] = float(norm)
    if run.device.type == "cuda":
        scalars["memory/device_mib"] = torch.cuda.max_memory_allocated() / 2**20
    if run.recorder is not None:
        run.recorder.step(done, run.total_steps, (done - 1) // per_epoch, scalars)
    run.figures = {
        "loss": scalars["loss/total"],
        "images_per_s": scalars["throughput/images_per_s"],
        "data_wait_share": scalars["throughput/data_wait_share"],
    }


def _evaluate(run: Trainer, stepper: TrainingStep, done: int) -> dict[str, float]:
    config = run.config
    batch = min(
        64, 2 * stepper.engine.train_micro_batch_size_per_gpu()
    )  # without gradients twice as many fit
    normalise = DeviceAugment(config.augment, len(run.data.classes), run.job.seed, train=False)
    stepper.masters.average_buffers()
    stepper.masters.use_ema()
    stepper.engine.eval()
    with EvalLoader(
        run.data.split("validation"),
        image_size=config.image_size,
        resize=config.eval_resize,
        batch=batch,
        rank=run.world.rank,
        world_size=run.world.size,
        threads=machine.loader_threads(run.job.cluster),
    ) as loader:
        accuracy = validate(stepper.engine, loader, normalise, run.device, config.image_size)
    stepper.masters.use_masters()
    if run.recorder is not None:
        run.recorder.evaluation(done, accuracy.scalars())
        if len(accuracy.samples) > 1:
            run.recorder.images("reconstructions", done, picture_rows(accuracy.samples).numpy())
    return {"step": done, "top1": accuracy.top1, "top5": accuracy.top5, "loss": accuracy.loss}


def _checkpoint(
    run: Trainer, stepper: TrainingStep, replaced: ReplacedSamples, done: int, last: bool
) -> None:
    state = {
        "identity": run.identity(stepper.engine.module.spec),
        "optimizer_steps": stepper.applied,
        "repeated_steps": stepper.repeated,
        "replaced_samples": replaced.count(),
        "metrics": stepper.metrics.state(),
        "history": run.history,
        "figures": run.figures,
    }
    failure = save_checkpoint(
        run.checkpoints, stepper.masters, done, state, run.config.keep_checkpoints, run.may_commit
    )
    if failure is None:
        run.log(f"checkpoint at step {done}")
    elif last:
        raise CheckpointError(
            f"the final checkpoint cannot be written: {failure}",
            place=str(run.checkpoints),
            remedy="make room, then run the same command again: it goes on from the checkpoint before",
        )
    else:
        run.log(
            f"the checkpoint at step {done} cannot be written, training goes on: {failure}",
            "warning",
        )
