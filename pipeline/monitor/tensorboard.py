"""Writes TensorBoard files: scalars grouped by the custom-scalars plugin, images, hyperparameters.

TensorBoard is for looking at: if its directory cannot be written, training continues after one
warning.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from pipeline.monitor import tags

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


def _lines(*patterns: str) -> list[str | list[str]]:
    """One chart with a line for every tag that matches one of the regular expressions."""
    return ["Multiline", list(patterns)]


def _every_position(tag: Callable[[int], str]) -> str:
    r"""The pattern of a tag that exists per position: ``position_0/x`` -> ``position_\d+/x``."""
    return tag(0).replace("0", r"\d+")


# Groups of charts in the tab Custom Scalars: {group: {title of the chart: its lines}}.
_LAYOUT = {
    "Loss": {
        "total": _lines(tags.LOSS),
        "validation": _lines(tags.VALIDATION_LOSS),
        "classification by position": _lines(_every_position(tags.classification_loss)),
        "reconstruction by position": _lines(_every_position(tags.reconstruction_loss)),
    },
    "Accuracy": {
        "validation": _lines(r"accuracy/(?!train_).*"),
        "training": _lines(tags.TRAIN_TOP1),
    },
    "Selection of the best weights": {
        "top-1 on the selection split": _lines(tags.SELECTION_TOP1),
        "step that is kept": _lines(tags.KEPT_STEP),
    },
    "Optimisation": {
        "learning rate": _lines(tags.LEARNING_RATE),
        "gradient norm": _lines(tags.GRAD_NORM),
    },
    "Machine": {
        "images per second": _lines(tags.IMAGES_PER_S),
        "share of time waiting for data": _lines(tags.DATA_WAIT_SHARE),
        "replaced samples": _lines(tags.REPLACED_SAMPLES),
        "memory (MiB)": _lines(tags.RSS_MIB, tags.DEVICE_MIB),
    },
    "Reversible columns": {
        "mismatched elements": _lines(tags.MISMATCHED_ELEMENTS),
        "retried steps": _lines(tags.RETRIED_STEPS),
        "largest value of the stream": _lines(tags.MAX_ABS),
    },
}


class Board:
    """The TensorBoard directory of one stage.

    Every method is safe to call after the directory has become unwritable: it does nothing then.

    Args:
        directory: receives the event files.
        purge_step: on resume, TensorBoard discards the points at this step and later.
        warn: called once, with the reason, when writing fails.
    """

    def __init__(
        self, directory: Path, *, purge_step: int | None, warn: Callable[[str], None]
    ) -> None:
        self._directory = directory
        self._warn = warn
        self._writer: SummaryWriter | None = None

        def start() -> None:
            from torch.utils.tensorboard import SummaryWriter

            # Seconds between two writes to disk, so that curves appear while the stage runs. The
            # default is 120.
            self._writer = SummaryWriter(str(directory), purge_step=purge_step, flush_secs=15)
            self._writer.add_custom_scalars(_LAYOUT)

        self._try(start)

    def scalars(self, step: int, values: dict[str, float]) -> None:
        def write(writer: SummaryWriter) -> None:
            for tag, value in values.items():
                writer.add_scalar(tag, value, step)

        self._with_writer(write)

    def images(self, tag: str, step: int, images: NDArray[np.uint8]) -> None:
        """``images`` uint8 (n, H, W, 3), shown as one grid."""
        self._with_writer(
            lambda writer: writer.add_image(tag, grid(images), step, dataformats="HWC")
        )

    def hparams(self, values: dict[str, str | float | bool], metrics: dict[str, float]) -> None:
        """Hyperparameters and final metrics."""

        def write(writer: SummaryWriter) -> None:
            from torch.utils.tensorboard.summary import hparams

            # SummaryWriter.add_hparams would open a sub-directory, which TensorBoard lists as one
            # more run. Write the same three summaries into this run instead.
            for summary in hparams(values, metrics):
                writer._get_file_writer().add_summary(summary)
            for tag, value in metrics.items():
                writer.add_scalar(tag, value)

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


def grid(images: NDArray[np.uint8], columns: int = 8) -> NDArray[np.uint8]:
    """Tile uint8 (n, H, W, 3) row by row into one image (rows * H, columns * W, 3).

    The unused tiles of the last row are black. Example: 11 images in 8 columns give 2 rows; the
    last 5 tiles are black.
    """
    count, height, width, channels = images.shape
    columns = max(1, min(columns, count))
    rows = math.ceil(count / columns)
    padded = np.zeros((rows * columns, height, width, channels), np.uint8)
    padded[:count] = images
    tiles = padded.reshape(rows, columns, height, width, channels).swapaxes(1, 2)
    return tiles.reshape(rows * height, columns * width, channels)
