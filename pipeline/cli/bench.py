"""Commands that measure: bench reversible, bench loader, bench prepare."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pipeline.cli.options import JsonFile

app = typer.Typer(
    help="Run a benchmark against its baselines.", no_args_is_help=True, rich_markup_mode=None
)


@app.command("reversible")
def bench_reversible(
    json_file: JsonFile = None,
    plot: Annotated[
        Path | None,
        typer.Option(help="Also plot memory against columns (SVG).", show_default=False),
    ] = None,
    columns: Annotated[
        str, typer.Option(help="Numbers of columns, comma-separated.")
    ] = "4,8,16,32",
    precision: Annotated[str, typer.Option(help="fp32 or bf16.")] = "fp32",
    batch: Annotated[int, typer.Option(help="Images per step.")] = 8,
    rounds: Annotated[
        int, typer.Option(min=1, help="Timings per case, each in a new process.")
    ] = 3,
) -> None:
    """Measure memory, step time and gradients of every activation mode."""
    from pipeline.bench import reversible

    # typer has no type for a list in one argument.
    try:
        counts = [int(count) for count in columns.split(",")]
    except ValueError:
        raise typer.BadParameter("needs numbers such as 4,8,16", param_hint="--columns") from None
    reversible.main(
        counts, json_path=json_file, plot_path=plot, precision=precision, batch=batch, rounds=rounds
    )


@app.command("loader")
def bench_loader(json_file: JsonFile = None) -> None:
    """Measure images per second and memory of this loader and of three others.

    The others are PyTorch's DataLoader with Pillow, WebDataset and Hugging Face datasets.
    """
    from pipeline.bench import loader

    loader.main(json_file)


@app.command("prepare")
def bench_prepare(json_file: JsonFile = None) -> None:
    """Measure images per second of preparation and of a Pillow process pool."""
    from pipeline.bench import prepare

    prepare.main(json_file)
