"""A training stage in one process (of one or many): what the Ray actors call and what ``python -m pipeline train`` runs."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.distributed as dist

from pipeline.config import resolve
from pipeline.config.schema import Job, TrainConfig
from pipeline.data.device import DeviceAugment
from pipeline.data.format import PreparedDataset, open_dataset
from pipeline.data.loader import EvalLoader, TrainLoader
from pipeline.errors import Interrupted
from pipeline.model.stream import ALPHA_LIMIT, remainder_width
from pipeline.monitor.recorder import Recorder
from pipeline.train.build import initial_weights, network_spec
from pipeline.train.engine import make_engine, setup_process
from pipeline.train.masters import Masters
from pipeline.train.metrics import Metrics
from pipeline.train.schedule import Schedule
from pipeline.train.state import load_initial, restore, save_checkpoint, write_weights
from pipeline.train.step import Stepper
from pipeline.train.stop import StopAgreement
from pipeline.train.validate import Accuracy, picture_rows, validate
from pipeline.train.world import World


@dataclass
class Run:
    """One training stage under way."""

    job: Job
    stage: str
    config: TrainConfig
    run_dir: Path
    world: World
    device: torch.device
    data: PreparedDataset
    recorder: Recorder | None = None
    history: list[dict[str, float]] = field(default_factory=list)  # one entry an evaluation
    unsaid: list[str] = field(default_factory=list)  # messages from before the recorder was there

    @property
    def checkpoints(self) -> Path:
        return self.run_dir / "checkpoints" / self.stage

    def say(self, text: str) -> None:
        """A message in the stage's events (from rank 0)."""
        self.unsaid.append(text)
        if self.recorder is not None:
            for message in self.unsaid:
                self.recorder.message(message)
            self.unsaid.clear()

    def may_commit(self) -> bool:
        """Whether this group of processes is still the current one (a replaced one may live on for a while)."""
        path = self.run_dir / "stages" / self.stage / "generation"
        return not path.exists() or path.read_text().strip() == str(self.world.generation)

    def identity(self, spec: Any) -> dict[str, Any]:
        """What a checkpoint must agree with."""
        network = {key: value for key, value in asdict(spec).items() if key not in ("activations", "drop_path")}
        return {
            "network": network,
            "data": self.data.fingerprint,
            "seed": self.job.seed,
            "global_batch": self.config.global_batch,
        }


def train_stage(job: Job, stage: str, run_dir: Path, world: World, stop: Callable[[], bool]) -> dict[str, float]:
    """Run (or go on with) a training stage.

    Args:
        stage: 'pretrain' or 'finetune'.
        stop: asked once a step on every rank; when true on any, all write a checkpoint and raise ``Interrupted``.

    Returns:
        Figures: loss, top1, top5, images_per_s, steps, data_wait_share, seconds.
    """
    config = resolve.train_config(job, stage)
    device = setup_process(world, resolve.device(job.cluster) == "cuda", resolve.threads(job.cluster))
    data = open_dataset(run_dir / "stages" / "prepare" / resolve.dataset_name(job, stage))
    run = Run(job, stage, config, run_dir, world, device, data)
    try:
        return _train(run, stop)
    finally:
        if run.recorder is not None:
            run.recorder.close()
        if dist.is_initialized():
            dist.destroy_process_group()


def _train(run: Run, stop: Callable[[], bool]) -> dict[str, float]:
    job, config, world, device = run.job, run.config, run.world, run.device
    micro, accumulation = resolve.batches(config, world.size)
    spec = network_spec(job, config, len(run.data.classes))
    engine = make_engine(spec, config, world, micro, job.seed, device)
    masters = Masters(engine, config.ema)
    manifest = restore(run.checkpoints, masters, run.identity(spec), run.say)
    start = manifest.step if manifest else 0
    if world.is_main:
        run.recorder = Recorder(run.run_dir, run.stage, resume_step=start)
    if manifest:
        run.history = manifest.state["history"]
        run.say(f"going on from step {start}")
    elif config.initial:
        load_initial(initial_weights(run.run_dir, config.initial), masters, config.initial, run.say)
    with TrainLoader(
        run.data.split("train"), seed=job.seed, image_size=config.image_size, augment=config.augment,
        global_batch=config.global_batch, micro_batch=micro, rank=world.rank, world_size=world.size,
        threads=resolve.loader_threads(job.cluster), start_step=start,
    ) as loader:  # fmt: skip
        schedule = Schedule.of(config, loader.steps_per_epoch)
        positions = len(spec.supervised_columns)
        metrics = Metrics(positions, positions - 1, device)
        if manifest:
            metrics.restore(**manifest.state["metrics"])
        augment = DeviceAugment(config.augment, len(run.data.classes), job.seed, train=True)
        applied = manifest.state["optimizer_steps"] if manifest else 0
        stepper = Stepper(engine, masters, schedule, augment, metrics, job.seed, accumulation, device, applied)
        figures = _loop(run, stepper, loader, start, StopAgreement(stop))
    if world.is_main:
        newest = run.checkpoints / f"step-{schedule.total_steps:08d}"
        facts = {"classes": run.data.classes, "image_size": config.image_size, "figures": figures, "data": run.data.fingerprint}
        write_weights(run.run_dir / "stages" / run.stage, newest, spec, facts)
        assert run.recorder is not None
        hparams = {"lr": config.lr, "global_batch": config.global_batch, "epochs": config.epochs,
                   "weight_decay": config.weight_decay, "image_size": config.image_size}  # fmt: skip
        run.recorder.hparams(hparams, {key: figures[key] for key in ("top1", "loss") if key in figures})
    dist.barrier()
    return figures


def _loop(run: Run, stepper: Stepper, loader: TrainLoader, start: int, agreement: StopAgreement) -> dict[str, float]:
    config, total = run.config, stepper.schedule.total_steps
    per_epoch = loader.steps_per_epoch
    evaluate_every = max(1, round(config.eval_epochs * per_epoch))
    checkpoint_every = config.checkpoint_steps or per_epoch
    batches, clock = iter(loader), _Clock(loader, run.config.global_batch, start)
    figures: dict[str, float] = {}
    _set_widths(stepper, config.log_steps)
    for step in range(start, total):
        stepper.engine.train()
        stepper.run(step, batches)
        done, last = step + 1, step + 1 == total
        if done % config.log_steps == 0 or last:
            figures |= _log(run, stepper, clock, done, per_epoch)
            _set_widths(stepper, config.log_steps)
        if done % evaluate_every == 0 or last:
            with clock.paused():
                run.history.append(_evaluate(run, stepper, done))
        stopping = agreement.after_step() and not last
        if done % checkpoint_every == 0 or last or stopping:
            with clock.paused():
                _checkpoint(run, stepper, done)
        if stopping:
            raise Interrupted(f"{run.stage} stopped after step {done} of {total}", remedy="the same command goes on from there")
    agreement.close()
    figures |= {key: run.history[-1][key] for key in ("top1", "top5")}
    return {**figures, "steps": float(total)}


def _set_widths(stepper: Stepper, log_steps: int) -> None:
    """Bits of the remainders until the next time: alpha moves at most by about 3 rates a step under Adam."""
    network = stepper.engine.module
    if network.spec.activations == "exact":
        drift = 4 * stepper.schedule.peak * log_steps
        network.remainder_widths = [
            [remainder_width(max(smallest - drift, ALPHA_LIMIT / 2)) for smallest in column]
            for column in stepper.masters.smallest_alpha()
        ]


def _log(run: Run, stepper: Stepper, clock: _Clock, done: int, per_epoch: int) -> dict[str, float]:
    scalars = stepper.metrics.read()
    norm = stepper.engine.get_global_grad_norm()
    scalars |= {
        "optim/lr": stepper.schedule(done - 1),
        "optim/grad_norm": float(norm) if norm is not None else math.nan,
        "optim/skipped_steps": float(done - stepper.applied),
        "memory/rss_mib": psutil.Process().memory_info().rss / 2**20,
        **clock.rates(done),
    }
    if run.device.type == "cuda":
        scalars["memory/device_mib"] = torch.cuda.max_memory_allocated() / 2**20
    if run.recorder is not None:
        run.recorder.step(done, stepper.schedule.total_steps, (done - 1) // per_epoch, scalars)
    return {
        "loss": scalars["loss/total"],
        "images_per_s": scalars["throughput/images_per_s"],
        "data_wait_share": scalars["throughput/data_wait_share"],
    }


def _evaluate(run: Run, stepper: Stepper, done: int) -> dict[str, float]:
    config, split = run.config, run.data.split("validation")
    batch = min(64, max(1, config.global_batch // run.world.size))
    stepper.masters.use_ema()
    stepper.engine.eval()
    loader = EvalLoader(
        split, image_size=config.image_size, resize=config.eval_resize, batch=batch, rank=run.world.rank,
        world_size=run.world.size, threads=resolve.loader_threads(run.job.cluster),
    )  # fmt: skip
    normalise = DeviceAugment(config.augment, len(run.data.classes), run.job.seed, train=False)
    forwards = math.ceil(math.ceil(len(split) / run.world.size) / batch)
    accuracy: Accuracy = validate(stepper.engine, loader, normalise, run.device, forwards)
    stepper.masters.use_masters()
    if run.recorder is not None:
        run.recorder.evaluation(done, accuracy.scalars())
        if len(accuracy.samples) > 1:
            run.recorder.images("reconstructions", done, picture_rows(accuracy.samples).numpy())
    return {"step": done, "top1": accuracy.top1, "top5": accuracy.top5, "loss": accuracy.loss}


def _checkpoint(run: Run, stepper: Stepper, done: int) -> None:
    state = {
        "identity": run.identity(stepper.engine.module.spec),
        "optimizer_steps": stepper.applied,
        "metrics": stepper.metrics.state(),
        "history": run.history,
    }
    saved = save_checkpoint(run.checkpoints, stepper.masters, done, state, run.config.keep_checkpoints, run.may_commit)
    run.say(f"checkpoint at step {done}" if saved else f"checkpoint at step {done} was NOT written; the previous one stays")


class _Clock:
    """Images per second and data-wait share since the last reading, without evaluation and checkpoints."""

    def __init__(self, loader: TrainLoader, global_batch: int, step: int) -> None:
        self._loader, self._batch = loader, global_batch
        self._since, self._step, self._waited = time.perf_counter(), step, loader.data_wait

    def rates(self, step: int) -> dict[str, float]:
        now = time.perf_counter()
        seconds = max(now - self._since, 1e-9)
        result = {
            "throughput/images_per_s": (step - self._step) * self._batch / seconds,
            "throughput/data_wait_share": (self._loader.data_wait - self._waited) / seconds,
        }
        self._since, self._step, self._waited = now, step, self._loader.data_wait
        return result

    def paused(self) -> _Pause:
        return _Pause(self)

    def skip(self, seconds: float) -> None:
        self._since += seconds


class _Pause:
    def __init__(self, clock: _Clock) -> None:
        self._clock = clock

    def __enter__(self) -> None:
        self._started = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self._clock.skip(time.perf_counter() - self._started)
