"""The evaluations of a training stage: between two of its steps, by all of its processes."""

from __future__ import annotations

from dataclasses import dataclass

from pipeline.config import machine
from pipeline.data.device import DeviceAugment
from pipeline.data.loader import EvalLoader
from pipeline.data.preprocessing import Preprocessing
from pipeline.evaluate.accuracy import Evaluation, validate
from pipeline.evaluate.metrics import TOP1, tagged
from pipeline.evaluate.pictures import record_samples
from pipeline.monitor import tags
from pipeline.monitor.goodput import EVALUATION
from pipeline.runtime.rank_link import RankLink
from pipeline.train.context import StageContext, StageLog
from pipeline.train.ema import ema_weights
from pipeline.train.setup import StageSetup

_MOST_IMAGES = 64  # per process


@dataclass(frozen=True, kw_only=True)
class StageEvaluation:
    """Evaluates the network of a stage. All ranks make the same calls."""

    context: StageContext
    setup: StageSetup
    log: StageLog
    link: RankLink

    @property
    def batch(self) -> int:
        """Images per process of the largest batch."""
        # Without gradients, twice as many images fit into memory.
        engine = self.setup.step.context.engine
        return min(_MOST_IMAGES, 2 * engine.train_micro_batch_size_per_gpu())

    def run(self, done: int) -> dict[str, float]:
        """Evaluate the EMA (without one, the weights) on the validation split. Collective.

        With ``keep: best``, also on the selection split; the best weights are remembered.
        """
        state = self.setup.step.context.state
        with ema_weights(state):
            evaluation = self._validate("validation", done)
            scores = {"step": done, **evaluation.metrics}
            selection = self.setup.selection
            if selection is not None:
                # Without a split of its own, the images of the curve choose.
                separate = selection.split != "validation"
                chooses = self._validate(selection.split, done) if separate else evaluation
                scores[selection.metric] = chooses.metrics[TOP1]
        values = tagged("validation", evaluation.metrics)
        if selection is not None:
            best = selection.best([*self.setup.history.evaluations, scores])
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

    def _validate(self, split: str, done: int) -> Evaluation:
        """Evaluate on a split of the dataset. Collective."""
        context = self.context
        config = context.config
        engine = self.setup.step.context.engine
        engine.eval()
        normalise = DeviceAugment(
            config.augment, context.num_classes, context.job.seed, train=False
        )
        with EvalLoader(
            context.data.split(split),
            preprocessing=Preprocessing(config.image_size, config.preprocessing),
            batch=self.batch,
            rank=context.dist_env.rank,
            world_size=context.dist_env.size,
            threads=machine.loader_threads(context.job.cluster, context.dist_env.local_size),
            pin_memory=context.device.type == "cuda",
        ) as loader:
            return validate(
                engine,
                loader,
                normalise,
                context.device,
                on_batch=lambda: self.link.beat(done, EVALUATION),
            )
