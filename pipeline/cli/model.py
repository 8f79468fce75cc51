"""Commands that use a trained model: predict, weights, export."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from pipeline.layout import RUNS


def _log(text: str, level: str = "info") -> None:
    # Beside the output, which may be piped into another command.
    print(text, file=sys.stderr)


def weights(
    file: Annotated[
        str,
        typer.Argument(
            metavar="FILE",
            help="A weights file (.pth, .pt, .bin, .safetensors), or the folder of a model.",
            show_default=False,
        ),
    ],
) -> None:
    """Show which network a weights file is of, and its classes. Executes nothing in the file."""
    from pipeline.export.weights_summary import weights_summary

    for label, text in weights_summary(file):
        print(f"{label:<13}{text}")


def export(
    model: Annotated[
        str,
        typer.Argument(
            metavar="RUN_OR_EXPORT",
            help="A run (name or directory), or the folder of an exported model.",
            show_default=False,
        ),
    ],
    to: Annotated[
        str,
        typer.Option("--to", help="Formats, separated by commas: hub, onnx, torch_export."),
    ] = "hub",
    precision: Annotated[
        str, typer.Option(help="Of the weights in the folder hub: fp32 or bf16.")
    ] = "fp32",
) -> None:
    """Write an exported model in the formats of other libraries, and check each of them."""
    from pipeline.export.formats import require_packages, write_formats
    from pipeline.orchestrate.predict import find_export

    if precision not in ("fp32", "bf16"):
        raise typer.BadParameter("--precision is fp32 or bf16")
    names = to.split(",")
    # Before a model is loaded, which can take a minute.
    require_packages(names)
    folder = find_export(model, RUNS)
    # Each with its check: a format that computes something else is an error, not a line.
    for check in write_formats(folder, names, _log, hub_precision=precision):
        difference = f"largest difference of logits {check['largest_difference']:.1e}"
        print(f"{check['format']:<13}{difference}, {check['images_per_s']:,.1f} images/s")


def predict(
    model: Annotated[
        str,
        typer.Argument(
            metavar="RUN_OR_EXPORT",
            help="A run (name or directory), the folder or a file of an exported model, or a "
            "published weights file.",
            show_default=False,
        ),
    ],
    images: Annotated[
        list[str],
        typer.Argument(
            metavar="IMAGES...",
            help="Files, folders, and patterns such as 'photos/**/*.jpg'.",
            show_default=False,
        ),
    ],
    best: Annotated[int, typer.Option("--top-k", min=1, help="Classes per image.")] = 3,
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON list.")] = False,
    as_csv: Annotated[bool, typer.Option("--csv", help="Print CSV.")] = False,
    batch: Annotated[int, typer.Option(min=1, help="Images in one forward pass.")] = 16,
) -> None:
    """Print the most probable classes of images.

    A file that is no image does not end the work: it is listed at the end, and the exit code is 3.
    """
    from pipeline.orchestrate.predict import predict

    if as_json and as_csv:
        raise typer.BadParameter("choose one of --json and --csv")
    form = "json" if as_json else "csv" if as_csv else "text"
    predict(model, images, runs=RUNS, best=best, batch=batch, form=form)
