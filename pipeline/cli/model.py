"""Commands that use an exported model: predict."""

from __future__ import annotations

from typing import Annotated

import typer

from pipeline.layout import RUNS


def predict(
    model: Annotated[
        str,
        typer.Argument(
            metavar="RUN_OR_EXPORT",
            help="A run (name or directory), or the folder or a file of an exported model.",
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
