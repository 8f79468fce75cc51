"""A training stage in one process, of one or many: the loop over optimizer steps.

Ray actors and ``pipeline train`` call ``train_stage``.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from pipeline.config import job_queries
from pipeline.config.schema import Job
from pipeline.data.device import DeviceBatch
from pipeline.data.job_dataset import open_job_dataset
from pipeline.data.loader import Batch, TrainLoader
from pipeline.data.network_inputs import batch_sheet, network_inputs
from pipeline.errors import Interrupted
from pipeline.layout import RunDir
from pipeline.monitor import tags
from pipeline.monitor.goodput import CHECKPOINT, EVALUATION, STEP
from pipeline.runtime.dist_env import DistEnv
from pipeline.runtime.process_group import process_group
from pipeline.runtime.rank_link import RankLink
from pipeline.train.alpha_clamp import alpha_range
from pipeline.train.capture import write_record
from pipeline.train.context import StageContext, StageLog
from pipeline.train.fence import Fence
from pipeline.train.first_batch import try_full_batch
from pipeline.train.preemption import CollectiveStop
from pipeline.train.profiling import profiled
from pipeline.train.replaced_samples import ReplacedSamples
from pipeline.train.result import write_result
from pipeline.train.rewind import rewind
from pipeline.train.saving import CheckpointSaver
from pipeline.train.setup import StageSetup, set_up, train_loader
from pipeline.train.stage_evaluation import StageEvaluation
from pipeline.train.step_errors import settings_named
from pipeline.train.step_metrics import StepMetrics
from pipeline.train.step_times import TimesLog
from pipeline.train.throughput import Throughput
from pipeline.train.training_state import TrainingState


def train_stage(
    job: Job, stage: str, run_dir: RunDir, world: DistEnv, link: RankLink
) -> dict[str, float]:
    """Run a training stage, or resume it from its newest checkpoint.

    Args:
        stage: 'pretrain' or 'finetune'.
        link: asked once per step on every rank whether a stop is requested. After a request on any
            rank, all ranks write a checkpoint and raise ``Interrupted``.

    Returns:
        loss, images_per_s and data_wait_share of the last log; top1 and top5 of the last
        evaluation; steps.
    """
    config = job_queries.train_config(job, stage)
    fence = Fence(run_dir.fence(stage), world.generation)
    fence.require_file()  # now, rather than at the first checkpoint
    with process_group(world, job.cluster) as device:
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
                        train_loader(context, setup.first_data_step) as loader,
                        TimesLog(run_dir, stage, world.rank, log, setup.first_step) as times_log,
                    ):
                        trainer = Trainer(
                            context=context,
                            setup=setup,
                            loader=loader,
                            log=log,
                            times_log=times_log,
                            fence=fence,
                            link=link,
                        )
                        trainer.show_first_batch()
                        try:
                            trainer.run(CollectiveStop(link.stop_requested))
                        except BaseException:
                            trainer.saver.abandon()
                            raise
            return write_result(context, setup, log)
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
    link: RankLink
    replaced: ReplacedSamples = field(init=False)
    throughput: Throughput = field(init=False)
    evaluation: StageEvaluation = field(init=False)
    saver: CheckpointSaver = field(init=False)
    checkpoint_every: int = field(init=False)  # steps; by default an epoch
    metrics: StepMetrics = field(init=False)

    def __post_init__(self) -> None:
        context = self.context
        self.step = self.setup.step
        self.history = self.setup.history
        self.replaced = ReplacedSamples(self.loader, self.setup.replaced_samples, context.device)
        self.throughput = Throughput(self.loader, self.setup.first_step)
        self.log.seconds = self.throughput.take
        self.evaluation = StageEvaluation(
            context=context, setup=self.setup, log=self.log, link=self.link
        )
        every = context.config.checkpoint_every_steps
        self.checkpoint_every = every or self.loader.steps_per_epoch
        self.saver = CheckpointSaver(
            context=context,
            sharded=self.step.context.state,
            every=self.checkpoint_every,
            selection=self.setup.selection,
            fence=self.fence,
            log=self.log,
        )
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
            StageError: on all ranks, if training does not recover from bad steps.
        """
        config = self.context.config
        total_steps = self.context.total_steps
        evaluate_every = max(1, round(config.eval_every_epochs * self.loader.steps_per_epoch))
        self.step.context.set_remainder_widths()
        if not self.setup.resumed:  # a resumed stage has done steps of this size before
            with settings_named(self.context, " in a trial before the first step"):
                try_full_batch(self.context, self.step, self.evaluation.batch)
        self.throughput.begin(STEP)
        done = self.setup.first_step  # steps as users count them, from 1
        while done < total_steps:
            self._run_step(done)
            if self.step.context.guard.must_rewind:
                done = self._rewind(done)
                continue
            done += 1
            self.link.beat(done, STEP)
            last = done == total_steps
            if self._is_logged(done):
                self._log_metrics(done)
            # Evaluate before the checkpoint: a resumed run must not repeat the evaluation.
            if done % evaluate_every == 0 or last:
                with self.throughput.spent_on(EVALUATION):
                    self.history.evaluations.append(self.evaluation.run(done))
            # Asked after the last step too, although the answer no longer matters: a pending
            # reduction needs all ranks.
            stopping = stop.after_step() and not last
            if done % self.checkpoint_every == 0 or last or stopping:
                self.link.beat(done, CHECKPOINT)
                with self.throughput.spent_on(CHECKPOINT):
                    self.saver.save(done, self._state())
            self.saver.report()
            if last or stopping:
                with self.throughput.spent_on(CHECKPOINT):
                    self.saver.finish(needed=last)
            if stopping:
                stop.close()
                raise Interrupted(
                    f"{self.context.stage} stopped after step {done} of {total_steps}",
                    remedy="rerun the same command to resume",
                )
        stop.close()
        self.throughput.begin(CHECKPOINT)  # what follows writes the result

    def _run_step(self, step: int) -> None:
        """Run a step (0-based); of those that are looked at more closely, with what that needs."""
        done = step + 1
        # Only the updates that are logged are looked at: a look costs a few kernels.
        self.metrics.norms.active = self._is_logged(done)
        # Of two profilers, only one can record a step.
        counts = step == 0 and done not in self.context.config.profile_steps
        self.step.context.engine.train()
        with profiled(self.context, done, self.log), self.metrics.memory.counted(counts):
            self.step.run(step, self.loader)
        self._capture(step)

    def _is_logged(self, done: int) -> bool:
        return done % self.context.config.log_every_steps == 0 or done == self.context.total_steps

    def _capture(self, step: int) -> None:
        """Keep what is needed to replay a step (0-based), if it is bad. Collective."""
        guard = self.step.context.guard
        if step in guard.state.bad_steps and guard.wants_capture(step):
            self.saver.capture(step, self._state())
            write_record(self.context, self.step, self.loader, step)
            self.loader.rewind(step + 1 + guard.state.shift)

    def _rewind(self, step: int) -> int:
        """Return to an earlier checkpoint; the steps that it has done. Collective."""
        self.saver.finish(needed=False)
        done = rewind(
            self.context,
            self.setup,
            self.log,
            step=step,
            every=self.checkpoint_every,
            seconds=self.throughput.take(),
        )
        self.loader.rewind(done + self.step.context.guard.state.shift)
        self.throughput.rewind(done)
        self.metrics.logged_step = done
        return done

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

    def _state(self) -> TrainingState:
        """The state of the loop for a checkpoint. Collective."""
        return TrainingState(
            identity=self.context.identity(self.setup.spec),
            applied_steps=self.step.applied_steps,
            world_size=self.context.dist_env.size,
            retried_steps=self.step.retried_steps,
            replaced_samples=self.replaced.count(),
            metric_sums=self.step.context.metrics.state(),
            evaluations=list(self.history.evaluations),
            last_metrics=self.history.last_metrics,
            loss_scale=self.step.context.loss_scale.state(),
            guard=self.step.context.guard.state,
        )
