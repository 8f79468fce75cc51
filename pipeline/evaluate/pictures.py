"""Pictures of an evaluation for TensorBoard: predictions, and reconstructions of the inputs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from pipeline.data.decode import Image
from pipeline.data.loader import Batch
from pipeline.data.sheet import GREEN, RED, Caption, RowLabel, Sheet, scaled, side_of
from pipeline.model import Output
from pipeline.monitor.recorder import Recorder

PREDICTIONS = 16  # images of a split whose predictions are shown
RECONSTRUCTIONS = 8  # of them, with their reconstructions
COLUMNS = 8
MIN_SHARE = 0.005  # a confidence below it would be printed as 0%


@dataclass(frozen=True, kw_only=True)
class Samples:
    """The first images of a rank's share of a split, and what the network made of them.

    images: uint8, (n, H, W, 3), n up to PREDICTIONS.
    rows, labels: sample number in the split, and class.
    predictions, confidences: the most probable class and its probability.
    reconstructions: one per decoder; uint8, (up to RECONSTRUCTIONS, H, W, 3).
    """

    images: Image
    rows: list[int]
    labels: list[int]
    predictions: list[int]
    confidences: list[float]
    reconstructions: list[Image]


def take_samples(batch: Batch, output: Output) -> Samples:
    """The samples of a batch on the host. Waits for the device."""
    probabilities = functional.softmax(output.logits[-1][:PREDICTIONS].float(), dim=1)
    confidences, predictions = probabilities.max(dim=1)
    return Samples(
        # A copy: the loader will overwrite the memory of the batch.
        images=batch.images[:PREDICTIONS].cpu().clone().numpy(),
        rows=batch.samples[:PREDICTIONS].tolist(),
        labels=batch.labels[:PREDICTIONS].tolist(),
        predictions=predictions.tolist(),
        confidences=confidences.tolist(),
        reconstructions=[
            _pixels(torch.sigmoid(logits[:RECONSTRUCTIONS].float()))
            for logits in output.reconstructions
        ],
    )


def record_samples(
    recorder: Recorder, step: int, samples: Samples, class_names: Sequence[str]
) -> None:
    """Show the samples in TensorBoard."""
    recorder.image("predictions", step, predictions_sheet(samples, class_names))
    if samples.reconstructions:  # a plain head has none
        recorder.image("reconstructions", step, reconstructions_sheet(samples, class_names))


def predictions_sheet(samples: Samples, class_names: Sequence[str]) -> Image:
    """Each image above the predicted class: green if it is right, else red with the true one.

    Returns:
        uint8, shape (height, width, 3), RGB.
    """
    count = len(samples.images)
    columns = min(COLUMNS, count)
    side = side_of(samples.images.shape[1])
    sheet = Sheet(
        rows=-(-count // columns), columns=columns, side=side, label_width=0, caption_lines=2
    )
    right = sum(
        label == best for label, best in zip(samples.labels, samples.predictions, strict=True)
    )
    sheet.title(f"predictions and their probabilities: {right} of {count} are right")
    sheet.tiles([scaled(image, side) for image in samples.images], captions(samples, class_names))
    return sheet.pixels()


def captions(samples: Samples, class_names: Sequence[str]) -> list[Caption]:
    """The text below each prediction.

    Example: "right, 93%: ape" and "row 5", or "wrong, 51%: bee" and "row 5, is ape".
    """
    # Names come last: a long one is cut.
    texts = []
    for row, label, best, confidence in zip(
        samples.rows, samples.labels, samples.predictions, samples.confidences, strict=True
    ):
        share = f"{confidence:.0%}" if confidence >= MIN_SHARE else "under 1%"
        if best == label:
            texts.append(Caption([f"right, {share}: {class_names[best]}", f"row {row}"], GREEN))
        else:
            truth = f"row {row}, is {class_names[label]}"
            texts.append(Caption([f"wrong, {share}: {class_names[best]}", truth], RED))
    return texts


def reconstructions_sheet(samples: Samples, class_names: Sequence[str]) -> Image:
    """Inputs above their reconstructions at each supervised position, one image per column.

    Returns:
        uint8, shape (height, width, 3), RGB.
    """
    inputs = samples.images[:RECONSTRUCTIONS]
    side = side_of(inputs.shape[1])
    sheet = Sheet(rows=1 + len(samples.reconstructions), columns=len(inputs), side=side)
    sheet.title("inputs and their reconstructions")
    sheet.labels(
        [
            RowLabel("input"),
            *(
                RowLabel(f"position {position}", ["reconstruction"])
                for position in range(len(samples.reconstructions))
            ),
        ]
    )
    for column, image in enumerate(inputs):
        shown = [image, *(pictures[column] for pictures in samples.reconstructions)]
        sheet.column(
            column,
            f"row {samples.rows[column]}",
            [scaled(image, side) for image in shown],
            [Caption([class_names[samples.labels[column]]])] * len(shown),
        )
    return sheet.pixels()


def _pixels(images: Tensor) -> Image:
    """(n, 3, H, W) in [0, 1] -> uint8, (n, H, W, 3)."""
    scaled_up = (images * 255).round().to(torch.uint8)
    return scaled_up.permute(0, 2, 3, 1).contiguous().cpu().numpy()
