"""Command node: Ray on one machine of a cluster, for scripts of schedulers and for containers."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    help="Start Ray on this machine and stay in the foreground, for scripts of schedulers.",
    no_args_is_help=True,
)

_DIRECTORY = typer.Option(
    "--directory", help="Everything that Ray writes; removed at the end.", show_default=False
)
_CPUS = typer.Option("--cpus", min=0, help="CPU cores that Ray may assign (default: all).")
_GPUS = typer.Option("--gpus", min=0, help="GPUs that Ray may assign (default: all).")
_GRACE = typer.Option(
    "--grace", min=1, help="Longest time from a stop signal to the end (seconds)."
)
_ADDRESS = typer.Option(
    "--address", metavar="IP", help="IP of this machine (default: that of its name)."
)


@app.command()
def head(
    directory: Annotated[Path, _DIRECTORY],
    cpus: Annotated[int | None, _CPUS] = None,
    gpus: Annotated[int | None, _GPUS] = None,
    grace: Annotated[float, _GRACE] = 120.0,
    address: Annotated[str, _ADDRESS] = "",
    port: Annotated[
        int, typer.Option(min=0, max=65535, help="Port for the other machines (0: any free one).")
    ] = 0,
    dashboard: Annotated[
        bool, typer.Option(help="Offer the API for Ray jobs, on port 8265 if it is free.")
    ] = True,
) -> None:
    """Start the head; DIRECTORY/address.json tells its addresses once it is up."""
    from pipeline.orchestrate.node import NodeOptions, run_node

    run_node(
        NodeOptions(
            directory=directory.absolute(),
            cpus=cpus,
            gpus=gpus,
            grace=grace,
            address=address,
            port=port,
            dashboard=dashboard,
        )
    )


@app.command()
def join(
    gcs: Annotated[str, typer.Argument(metavar="IP:PORT", help="Address of the head.")],
    directory: Annotated[Path, _DIRECTORY],
    cpus: Annotated[int | None, _CPUS] = None,
    gpus: Annotated[int | None, _GPUS] = None,
    grace: Annotated[float, _GRACE] = 120.0,
    address: Annotated[str, _ADDRESS] = "",
) -> None:
    """Add this machine to the cluster of a head."""
    from pipeline.orchestrate.node import NodeOptions, run_node

    run_node(
        NodeOptions(
            directory=directory.absolute(),
            gcs=gcs,
            cpus=cpus,
            gpus=gpus,
            grace=grace,
            address=address,
        )
    )
