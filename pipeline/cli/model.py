"""Commands that use an exported model: predict."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

_CLASSES_SHOWN = 3


def predict(
    export: Annotated[
        Path,
        typer.Argument(help="Folder of an exported model: runs/<name>/export.", show_default=False),
    ],
    images: Annotated[list[Path], typer.Argument(help="Image files.", show_default=False)],
) -> None:
    """Print the most probable classes of images."""
    from pipeline.export.reload import load_export

    model = load_export(export)
    for image in images:
        classes = ", ".join(
            f"{name} {probability:.1%}"
            for _, name, probability in model.predict(image, best=_CLASSES_SHOWN)
        )
        print(f"{image}: {classes}")
