"""Commands about prepared data: data show."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pipeline.cli.options import Overrides
from pipeline.layout import RUNS

app = typer.Typer(help="Look at prepared data.", no_args_is_help=True, rich_markup_mode=None)


@app.command("show")
def data_show(
    target: Annotated[
        Path,
        typer.Argument(
            metavar="RUN_OR_DATASET",
            help="A job file, a shipped job, a run, or a prepared dataset.",
            show_default=False,
        ),
    ],
    out: Annotated[Path, typer.Option(help="The image file to write (PNG).")] = Path("data.png"),
    epoch: Annotated[int, typer.Option(min=1, help="The first epoch to show.")] = 1,
    rows: Annotated[int, typer.Option(min=1, max=64, help="Number of images.")] = 8,
    stage: Annotated[
        str,
        typer.Option(
            help="Training stage whose augmentation is shown; default: the first.",
            show_default=False,
        ),
    ] = "",
    overrides: Overrides = None,
) -> None:
    """Draw a contact sheet of training images.

    Each row shows one image as stored, as augmented in a few epochs, and as the network gets it.
    """
    from pipeline.data.contact_sheet import contact_sheet
    from pipeline.data.dataset import open_dataset
    from pipeline.data.sheet import png
    from pipeline.files import write_bytes
    from pipeline.orchestrate.inspect_target import find

    inspected = find(target, RUNS, stage, overrides or [])
    sheet = contact_sheet(open_dataset(inspected.dataset), inspected.settings, epoch - 1, rows)
    write_bytes(out, png(sheet))
    height, width = sheet.shape[:2]
    augmentation = inspected.stage or "default augmentation"
    print(f"{out}: {width} x {height} pixels; {inspected.dataset}, {augmentation}")
