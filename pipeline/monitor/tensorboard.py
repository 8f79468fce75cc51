"""Writes TensorBoard files: scalars and the layout of their charts, images, texts, hyperparameters.

TensorBoard is for looking at: if its directory cannot be written, training continues after one
warning.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from pipeline.monitor import tags

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

Hparam = str | float | bool


def _lines(*patterns: str) -> list[str | list[str]]:
    """One chart with a line for every tag that matches one of the regular expressions."""
    # TensorBoard matches at the beginning of a tag only: "top1" would also match "top10".
    return ["Multiline", [f"{pattern}$" for pattern in patterns]]


def _every_position(tag: Callable[[int], str], stage: str) -> str:
    r"""The pattern of a tag that exists per position: ``position_0/x`` -> ``position_\d+/x``."""
    return tags.of_stage(tag(0), stage).replace("0", r"\d+")


def _losses(stage: str) -> dict[str, list[str | list[str]]]:
    """The charts of one training stage's losses."""
    return {
        "training": _lines(tags.of_stage(tags.LOSS, stage)),
        "validation": _lines(tags.of_stage(tags.VALIDATION_LOSS, stage)),
        "classification by position": _lines(_every_position(tags.classification_loss, stage)),
        "reconstruction by position": _lines(_every_position(tags.reconstruction_loss, stage)),
    }


TRAINED = {"pretrain": "Loss of pretraining", "finetune": "Loss of fine-tuning"}
# Groups of charts in the tab Custom Scalars: {group: {title of the chart: its lines}}.
_GROUPS = {
    "Accuracy": {
        # Of the validation split, and of another split that the evaluate stage reports.
        "top-1": _lines(r"accuracy/(?!train_)(\w+_)?top1"),
        "top-5": _lines(r"accuracy/(\w+_)?top5"),
        "top-1 of training batches": _lines(tags.TRAIN_TOP1),
    },
    "Selection of the best weights": {
        "top-1 on the selection split": _lines(tags.SELECTION_TOP1),
        "step that is kept": _lines(tags.KEPT_STEP),
    },
    "Evaluation": {"loss": _lines(r"loss_evaluate/\w+")},
    "Optimisation": {
        "learning rate": _lines(tags.LEARNING_RATE),
        "gradient norm": _lines(tags.GRAD_NORM),
        "skipped steps": _lines(tags.SKIPPED_STEPS),
        "learning rate by depth": _lines(r"layer_rates/group_\d+"),
        "norm of the gradient by part": _lines(r"gradient_norms/\w+"),
        "norm of the weights by part": _lines(r"weight_norms/\w+"),
        "norm of the update by part": _lines(r"update_norms/\w+"),
    },
    "Machine": {
        "images per second": _lines(tags.IMAGES_PER_S),
        "share of time waiting for data": _lines(tags.DATA_WAIT_SHARE),
        "replaced samples": _lines(tags.REPLACED_SAMPLES),
        "memory (MiB)": _lines(r"memory/\w+_mib"),
        "share of the devices' arithmetic": _lines(tags.MFU, tags.HFU),
        "slowest rank: time above the others (share)": _lines(tags.RANK_SPREAD),
        "slowest rank": _lines(tags.SLOWEST_RANK),
    },
    "Time of the run": {
        "goodput": _lines(tags.GOODPUT),
        "shares by part": _lines(r"goodput_parts/\w+"),
        "restarts": _lines(tags.RESTARTS),
    },
    "Reversible columns": {
        "mismatched elements": _lines(tags.MISMATCHED_ELEMENTS),
        "retried steps": _lines(tags.RETRIED_STEPS),
        "largest value of the stream": _lines(tags.MAX_ABS),
        "bits left by column": _lines(r"headroom/column_\d+"),
        "smallest and largest alpha by column": _lines(r"alpha/\w+_column_\d+"),
    },
}


def _layout(trained: Sequence[str]) -> dict[str, dict[str, list[str | list[str]]]]:
    """All groups of a job with these training stages.

    Every stage writes the layout of the job: TensorBoard shows that of the first one and adds what
    the others have more, so the order would depend on the stages.
    """
    return {TRAINED[stage]: _losses(stage) for stage in trained} | _GROUPS


class Board:
    """The TensorBoard directory of one stage.

    Every method is safe to call after the directory has become unwritable: it does nothing then.

    Args:
        directory: receives the event files.
        stage: its losses get the group ``loss_<stage>``.
        trained: training stages of the job; their losses have charts.
        purge_step: on resume, TensorBoard discards the points at this step and later.
        warn: called once, with the reason, when writing fails.
    """

    def __init__(
        self,
        directory: Path,
        stage: str,
        *,
        trained: Sequence[str],
        purge_step: int | None,
        warn: Callable[[str], None],
    ) -> None:
        self._directory = directory
        self._stage = stage
        self._warn = warn
        self._writer: SummaryWriter | None = None

        def start() -> None:
            from torch.utils.tensorboard import SummaryWriter

            # Seconds between two writes to disk, so that curves appear while the stage runs. The
            # default is 120.
            self._writer = SummaryWriter(str(directory), purge_step=purge_step, flush_secs=15)
            self._writer.add_custom_scalars(_layout(trained))

        self._try(start)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        def write(writer: SummaryWriter) -> None:
            for tag, value in values.items():
                writer.add_scalar(tags.of_stage(tag, self._stage), value, step)

        self._with_writer(write)

    def image(self, tag: str, step: int, image: NDArray[np.uint8]) -> None:
        """``image``: uint8, shape (H, W, 3)."""
        self._with_writer(lambda writer: writer.add_image(tag, image, step, dataformats="HWC"))

    def text(self, tag: str, step: int, markdown: str) -> None:
        self._with_writer(lambda writer: writer.add_text(tag, markdown, step))

    def hparams(self, values: Mapping[str, Hparam], compared: Sequence[str]) -> None:
        """The stage's row in the tab HParams.

        Args:
            values: hyperparameters.
            compared: tags in TensorBoard whose last values stand beside them. TensorBoard takes the
                columns of its table from any one of the stages, so they must be the same in all.
        """

        def write(writer: SummaryWriter) -> None:
            from torch.utils.tensorboard.summary import hparams

            # SummaryWriter.add_hparams would open a sub-directory, which TensorBoard lists as one
            # more run, and write the metrics a second time. Write the three summaries alone.
            for summary in hparams(dict(values), dict.fromkeys(compared, 0.0)):
                writer._get_file_writer().add_summary(summary)

        self._with_writer(write)

    def flush(self) -> None:
        self._with_writer(lambda writer: writer.flush())

    def close(self) -> None:
        self._with_writer(lambda writer: writer.close())
        self._writer = None

    def _with_writer(self, write: Callable[[SummaryWriter], None]) -> None:
        writer = self._writer
        if writer is not None:
            self._try(lambda: write(writer))

    def _try(self, action: Callable[[], None]) -> None:
        try:
            action()
        except (OSError, ImportError) as error:
            # Do not try again at the next step: one warning is enough, and a network file system
            # that fails often hangs as well.
            self._writer = None
            self._warn(f"TensorBoard is off: {self._directory} cannot be written: {error}")
