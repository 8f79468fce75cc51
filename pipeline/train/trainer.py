"""A training stage in one process, of one or many: the loop over optimizer steps.

Ray actors and ``pipeline train`` call ``train_stage``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from pipeline.checkpoint.description import WeightsDescription
from pipeline.checkpoint.manifest import directory_of
from pipeline.config import job_queries, machine
from pipeline.config.schema import Job
from pipeline.data.device import DeviceAugment, DeviceBatch
from pipeline.data.job_dataset import open_job_dataset
from pipeline.data.loader import Batch, EvalLoader, TrainLoader
from pipeline.data.network_inputs import batch_sheet, network_inputs
from pipeline.data.preprocessing import Preprocessing
from pipeline.errors import CheckpointError, Interrupted, StageError
from pipeline.evaluate.accuracy import Evaluation, validate
from pipeline.evaluate.metrics import COMPARED, LOSS, TOP1, tagged
from pipeline.evaluate.pictures import record_samples
from pipeline.layout import RunDir
from pipeline.monitor import tags
from pipeline.monitor.goodput import CHECKPOINT, EVALUATION, STEP
from pipeline.runtime.dist_env import DistEnv
from pipeline.runtime.process_group import process_group
from pipeline.train.alpha_clamp import alpha_range
from pipeline.train.checkpointing import save_checkpoint, write_weights
from pipeline.train.context import StageContext, StageLog
from pipeline.train.ema import ema_weights
from pipeline.train.fence import Fence
from pipeline.train.first_batch import try_full_batch
from pipeline.train.preemption import CollectiveStop
from pipeline.train.profiling import profiled
from pipeline.train.replaced_samples import ReplacedSamples
from pipeline.train.setup import StageSetup, set_up, train_loader
from pipeline.train.step_errors import require_progress, settings_named
from pipeline.train.step_metrics import StepMetrics
from pipeline.train.step_times import TimesLog
from pipeline.train.throughput import Throughput
from pipeline.train.training_state import TrainingState

MAX_EVAL_BATCH = 64  # images per process


def train_stage(
    job: Job, stage: str, run_dir: RunDir, world: DistEnv, stop: Callable[[], bool]
) -> dict[str, float]:
    """Run a training stage, or resume it from its newest checkpoint.

    Args:
        stage: 'pretrain' or 'finetune'.
        stop: whether a stop is requested; asked once per step on every rank. After a request on any
            rank, all ranks write a checkpoint and raise ``Interrupted``.

    Returns:
        loss, images_per_s and data_wait_share of the last log; top1 and top5 of the last
        evaluation; steps.
    """
    config = job_queries.train_config(job, stage)
    fence = Fence(run_dir.fence(stage), world.generation)
    fence.require_file()  # now, rather than at the first checkpoint
    use_cuda = machine.device(job.cluster) == "cuda"
    with process_group(world, use_cuda, machine.threads(job.cluster, world.local_size)) as device:
        context = StageContext(
            job=job,
            stage=stage,
            config=config,
            run_dir=run_dir,
            dist_env=world,
            device=device,
            data=open_job_dataset(job, run_dir, stage, whole=config.on_bad_sample == "stop"),
        )
        log = StageLog(is_main=world.is_main)
        try:
            with settings_named(context):
                setup = set_up(context, log)
                # A finished stage needs no loader. A stage without a single step does: the loader
                # reports that the dataset is smaller than a batch.
                if not setup.resumed or setup.first_step < context.total_steps:
                    with (
                        train_loader(context, setup.first_step) as loader,
                        TimesLog(run_dir, stage, world.rank, log) as times_log,
                    ):
                        trainer = Trainer(
                            context=context,
                            setup=setup,
                            loader=loader,
                            log=log,
                            times_log=times_log,
                            fence=fence,
                        )
                        trainer.show_first_batch()
                        trainer.run(CollectiveStop(stop))
            return _write_result(context, setup, log)
        finally:
            log.close()


@dataclass(kw_only=True)
class Trainer:
    """The loop of a training stage: steps, and between them logs, evaluations and checkpoints."""

    context: StageContext
    setup: StageSetup
    loader: TrainLoader
    log: StageLog
    times_log: TimesLog
    fence: Fence
    replaced: ReplacedSamples = field(init=False)
    throughput: Throughput = field(init=False)
    metrics: StepMetrics = field(init=False)

    def __post_init__(self) -> None:
        context = self.context
        self.step = self.setup.step
        self.history = self.setup.history
        self.replaced = ReplacedSamples(self.loader, self.setup.replaced_samples, context.device)
        self.throughput = Throughput(self.loader, self.setup.first_step)
        self.log.seconds = self.throughput.take
        self.metrics = StepMetrics(
            context=context,
            step=self.step,
            replaced=self.replaced,
            throughput=self.throughput,
            log=self.log,
            times_log=self.times_log,
            logged_step=self.setup.first_step,
        )

    def show_first_batch(self) -> None:
        """Show the next batch in TensorBoard, as the network receives it."""
        recorder = self.log.recorder
        if recorder is None:
            return
        context = self.context

        def show(batch: Batch, inputs: DeviceBatch) -> None:
            shown = network_inputs(
                inputs, context.data.class_names, context.config.augment.smoothing
            )
            title = f"step {batch.step + 1}: inputs of the network and their targets"
            picture = batch_sheet(shown, batch.samples.tolist(), title)
            recorder.image("augmented_batch", batch.step + 1, picture)

        self.step.on_next_batch = show

    def run(self, stop: CollectiveStop) -> None:
        """Train until the last step.

        Raises:
            Interrupted: on all ranks after the same step, if a stop is requested.
            StageError: on all ranks, if no step is applied any more.
        """
        config = self.context.config
        total_steps = self.context.total_steps
        # Steps between evaluations and between checkpoints. By default one checkpoint per epoch.
        evaluate_every = max(1, round(config.eval_every_epochs * self.loader.steps_per_epoch))
        checkpoint_every = config.checkpoint_every_steps or self.loader.steps_per_epoch
        self.step.context.set_remainder_widths()
        if not self.setup.resumed:  # a resumed stage has done steps of this size before
            with settings_named(self.context, " in a trial before the first step"):
                try_full_batch(self.context, self.step, self._eval_batch)
        self.throughput.begin(STEP)
        for step in range(self.setup.first_step, total_steps):
            self.step.context.engine.train()
            done = step + 1  # steps as users count them, from 1
            last = done == total_steps
            logged = done % config.log_every_steps == 0 or last
            # Only the updates that are logged are looked at: a look costs a few kernels.
            self.metrics.norms.active = logged
            # Of two profilers, only one can record a step.
            counts = step == 0 and done not in config.profile_steps
            with profiled(self.context, done, self.log), self.metrics.memory.counted(counts):
                self.step.run(step, self.loader)
            require_progress(self.context, done, self.step, self.loader.steps_per_epoch)
            if logged:
                self._log_metrics(done)
            # Evaluate before the checkpoint: a resumed run must not repeat the evaluation.
            if done % evaluate_every == 0 or last:
                with self.throughput.spent_on(EVALUATION):
                    self.history.evaluations.append(self._evaluate(done))
            # Asked after the last step too, although the answer no longer matters: a pending
            # reduction needs all ranks.
            stopping = stop.after_step() and not last
            if done % checkpoint_every == 0 or last or stopping:
                with self.throughput.spent_on(CHECKPOINT):
                    self._save_checkpoint(done, last)
            if stopping:
                stop.close()
                raise Interrupted(
                    f"{self.context.stage} stopped after step {done} of {total_steps}",
                    remedy="rerun the same command to resume",
                )
        stop.close()
        self.throughput.begin(CHECKPOINT)  # what follows writes the result

    def _log_metrics(self, done: int) -> None:
        """Log the metrics of the steps since the last log. Collective; waits for the device."""
        context = self.step.context
        # Before the reading: its own time belongs to the next interval.
        seconds = self.throughput.take()
        alphas = alpha_range(context.state)
        scalars = self.metrics.read(done, alphas, seconds)
        context.set_remainder_widths(alphas)
        if self.log.recorder is not None:
            epoch = (done - 1) // self.loader.steps_per_epoch + 1  # as users count them, too
            self.log.recorder.step(done, self.context.total_steps, epoch, scalars, seconds)
        self.history.last_metrics = {
            "loss": scalars[tags.LOSS],
            "images_per_s": scalars[tags.IMAGES_PER_S],
            "data_wait_share": scalars[tags.DATA_WAIT_SHARE],
        }
        if scalars[tags.SKIPPED_STEPS]:
            self.history.last_metrics["skipped_steps"] = scalars[tags.SKIPPED_STEPS]

    @property
    def _eval_batch(self) -> int:
        # Without gradients, twice as many images fit into memory.
        micro_batch = self.step.context.engine.train_micro_batch_size_per_gpu()
        return min(MAX_EVAL_BATCH, 2 * micro_batch)

    def _evaluate(self, done: int) -> dict[str, float]:
        """Evaluate the EMA (without one, the weights) on the validation split. Collective.

        With ``keep: best``, also on the selection split; the best weights are remembered.
        """
        state = self.step.context.state
        with ema_weights(state):
            evaluation = self._validate("validation")
            scores = {"step": done, **evaluation.metrics}
            selection = self.setup.selection
            if selection is not None:
                # Without a split of its own, the images of the curve choose.
                separate = selection.split != "validation"
                chooses = self._validate(selection.split) if separate else evaluation
                scores[selection.metric] = chooses.metrics[TOP1]
        values = tagged("validation", evaluation.metrics)
        if selection is not None:
            best = selection.best([*self.history.evaluations, scores])
            if best is scores:
                state.remember_best()
            values |= {
                tags.SELECTION_TOP1: scores[selection.metric],
                tags.KEPT_STEP: best["step"],
            }
        recorder = self.log.recorder
        if recorder is not None:
            recorder.evaluation(done, values)
            if evaluation.samples is not None:
                record_samples(recorder, done, evaluation.samples, self.context.data.class_names)
        return scores

    def _validate(self, split: str) -> Evaluation:
        """Evaluate on a split of the dataset. Collective."""
        context = self.context
        config = context.config
        engine = self.step.context.engine
        engine.eval()
        normalise = DeviceAugment(
            config.augment, context.num_classes, context.job.seed, train=False
        )
        with EvalLoader(
            context.data.split(split),
            preprocessing=Preprocessing(config.image_size, config.preprocessing),
            batch=self._eval_batch,
            rank=context.dist_env.rank,
            world_size=context.dist_env.size,
            threads=machine.loader_threads(context.job.cluster, context.dist_env.local_size),
            pin_memory=context.device.type == "cuda",
        ) as loader:
            return validate(engine, loader, normalise, context.device, config.image_size)

    def _save_checkpoint(self, done: int, last: bool) -> None:
        """Write a checkpoint; if that fails, only the last one ends the stage. Collective."""
        state = TrainingState(
            identity=self.context.identity(self.setup.spec),
            applied_steps=self.step.applied_steps,
            retried_steps=self.step.retried_steps,
            replaced_samples=self.replaced.count(),
            metric_sums=self.step.context.metrics.state(),
            evaluations=self.history.evaluations,
            last_metrics=self.history.last_metrics,
        )
        root = self.context.checkpoints
        try:
            failure = save_checkpoint(
                root,
                self.step.context.state,
                done,
                state,
                keep=self.context.config.keep_checkpoints,
                may_commit=self.fence.may_commit,
            )
        except StageError:
            # The commit was refused: by a newer group, or because the generation file is missing.
            self.fence.require_file()
            raise
        if failure is None:
            self.log(f"checkpoint at step {done} written")
        elif last:
            raise CheckpointError(
                f"the final checkpoint cannot be written: {failure}",
                place=str(root),
                remedy="free some disk space, or mount the run directory on every machine; then "
                "rerun the same command: it resumes from the checkpoint before",
            )
        else:
            self.log(
                f"checkpoint at step {done} could not be written, training continues: {failure}",
                "warning",
            )


def _write_result(context: StageContext, setup: StageSetup, log: StageLog) -> dict[str, float]:
    """Write the stage's weights, from its last checkpoint, and return its metrics. Collective."""
    config = context.config
    evaluations = setup.history.evaluations
    selection = setup.selection
    evaluation = evaluations[-1] if selection is None else selection.best(evaluations)
    step = context.total_steps if selection is None else int(evaluation["step"])
    # "loss" stays that of training: the evaluation's is in the event log.
    metrics = {
        **setup.history.last_metrics,
        **{name: value for name, value in evaluation.items() if name not in ("step", LOSS)},
        "steps": float(context.total_steps),
    }
    if selection is not None:
        metrics["kept_step"] = float(step)
        log(
            f"kept the weights of step {step}: top-1 {evaluation[selection.metric]:.1%} on the "
            f"{selection.split} split, the best of {len(evaluations)} evaluations"
        )
    description = WeightsDescription(
        classes=context.data.classes,
        image_size=config.image_size,
        preprocessing=config.preprocessing,
        precision=config.precision,
        data=context.data.fingerprint,
        metrics=metrics,
        step=step,
        keep=config.keep if selection is not None else "last",
        selection_split=selection.split if selection is not None else None,
    )
    checkpoint = directory_of(context.checkpoints, context.total_steps)
    write_weights(context.run_dir.stage(context.stage), checkpoint, setup.spec, description)
    if log.recorder is not None:
        log.recorder.hparams(job_queries.hyperparameters(context.job, context.stage), COMPARED)
    return metrics
