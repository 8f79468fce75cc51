"""``keep: best``: which evaluation's weights a stage hands on.

The choice is a function of the evaluations so far, which are part of every checkpoint; the weights
themselves are one more kind of tensor in it ("best", beside the fp32 weights and their EMA). So a
resumed run chooses as the uninterrupted one does, whenever it was stopped.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pipeline.errors import ConfigError
from pipeline.evaluate.metrics import TOP1
from pipeline.reporting import Log
from pipeline.train.context import StageContext

Scores = dict[str, float]  # of one evaluation, by name; "step" is among them


@dataclass(frozen=True)
class Selection:
    """Chooses the evaluation with the best top-1 on ``split``."""

    split: str

    @property
    def metric(self) -> str:
        """The name of the deciding figure in a record of an evaluation, and in run.json."""
        return f"{self.split}_{TOP1}"

    def best(self, evaluations: Sequence[Scores]) -> Scores:
        """The best evaluation; of equal ones the latest, which has trained longest.

        Example: 61% after step 10, 64% after 20 and 30, 63% after 40 -> step 30.

        Raises:
            ValueError: no evaluation has the figure.
        """
        scored = [scores for scores in evaluations if self.metric in scores]
        return max(scored, key=lambda scores: (scores[self.metric], scores["step"]))


def selection_of(context: StageContext, log: Log) -> Selection | None:
    """How the stage chooses its weights; None: it keeps the last ones.

    Raises:
        ConfigError: the stage wants the best ones, and its dataset has no split that may choose.
    """
    if context.config.keep == "last":
        return None
    split = context.data.description.selection_split()
    if split is not None:
        return Selection(split)
    name = context.data.path.name
    if context.job.data[name].selection_fraction:
        # Images are held out by a hash: of a few dozen, it may take none.
        log(f"{name} has too few images to choose the best weights: the last are kept", "warning")
        return None
    # Checked before anything starts, except for sources that only preparation can look into.
    raise ConfigError(
        f"keep: best needs images that choose the weights, and {name} reports the accuracy on its "
        "only validation images",
        place=f"stages.{context.stage}.keep",
        remedy=f"hold some out: --set data.{name}.selection_fraction=0.1, or keep: last",
    )
