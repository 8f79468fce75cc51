"""TensorBoard files: scalars, image grids and hyperparameters, laid out with the custom-scalars plugin.

TensorBoard is for looking at: a directory that cannot be written costs a warning, never the training.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

_LAYOUT = {
    "Loss": {
        "total": ["Multiline", ["loss/total"]],
        "validation": ["Multiline", ["loss/validation"]],
        "classification by position": ["Multiline", [r"loss/position_\d+/classification"]],
        "reconstruction by position": ["Multiline", [r"loss/position_\d+/reconstruction"]],
    },
    "Accuracy": {
        "validation": ["Multiline", [r"accuracy/top\d"]],
        "training": ["Multiline", ["accuracy/train_top1"]],
    },
    "Optimisation": {
        "learning rate": ["Multiline", ["optim/lr"]],
        "gradient norm": ["Multiline", ["optim/grad_norm"]],
    },
    "Machine": {
        "images a second": ["Multiline", ["throughput/images_per_s"]],
        "share of time waiting for data": ["Multiline", ["throughput/data_wait_share"]],
        "images that stand in for others": ["Multiline", ["data/replaced_samples"]],
        "memory (MiB)": ["Multiline", [r"memory/.*_mib"]],
    },
    "Reversible columns": {
        "mismatched elements": ["Multiline", ["reversible/mismatched_elements"]],
        "repeated steps": ["Multiline", ["reversible/repeated_steps"]],
        "largest value of the stream": ["Multiline", ["reversible/largest_value"]],
    },
}


class Board:
    """A TensorBoard directory of one stage; every method is safe to call after the directory became unwritable.

    Args:
        directory: where the event files go.
        purge_step: on resume, TensorBoard forgets what was logged at this step and later.
        warn: called once with the reason when writing fails.
    """

    def __init__(
        self, directory: Path, *, purge_step: int | None, warn: Callable[[str], None]
    ) -> None:
        self._directory, self._warn = directory, warn
        self._writer: SummaryWriter | None = None

        def start() -> None:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(directory), purge_step=purge_step, flush_secs=15)
            self._writer.add_custom_scalars(_LAYOUT)

        self._try(start)

    def scalars(self, step: int, values: dict[str, float]) -> None:
        def write(writer: SummaryWriter) -> None:
            for name, value in values.items():
                writer.add_scalar(name, value, step)

        self._with_writer(write)

    def images(self, tag: str, step: int, images: NDArray[np.uint8]) -> None:
        """``images`` uint8 (n, H, W, 3), shown as one grid."""
        self._with_writer(
            lambda writer: writer.add_image(tag, grid(images), step, dataformats="HWC")
        )

    def hparams(self, values: dict[str, str | float | bool], metrics: dict[str, float]) -> None:
        """Hyperparameters and the figures reached, in the same run (not in a sub-run, as ``add_hparams`` would)."""

        def write(writer: SummaryWriter) -> None:
            from torch.utils.tensorboard.summary import hparams

            for summary in hparams(values, metrics):
                writer._get_file_writer().add_summary(summary)
            for name, value in metrics.items():
                writer.add_scalar(name, value)

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
            self._writer = None
            self._warn(f"TensorBoard is off, {self._directory} cannot be written: {error}")


def grid(images: NDArray[np.uint8], columns: int = 8) -> NDArray[np.uint8]:
    """Tile uint8 (n, H, W, 3) into one (rows * H, columns * W, 3) picture, the last row filled with black."""
    count, height, width, channels = images.shape
    columns = max(1, min(columns, count))
    rows = math.ceil(count / columns)
    sheet = np.zeros((rows * columns, height, width, channels), np.uint8)
    sheet[:count] = images
    tiles = sheet.reshape(rows, columns, height, width, channels).swapaxes(1, 2)
    return tiles.reshape(rows * height, columns * width, channels)
