"""The command tensorboard."""

from __future__ import annotations

from typing import Annotated

import typer

from pipeline.layout import RUNS


def tensorboard(
    run: Annotated[
        str,
        typer.Argument(help="Name or directory of a run; default: all runs.", show_default=False),
    ] = "",
    port: Annotated[int, typer.Option(help="Port.")] = 6006,
    host: Annotated[
        str,
        typer.Option(help="Address to serve at. Any other than loopback is open to the network."),
    ] = "127.0.0.1",
) -> None:
    """Serve TensorBoard for one run or for all runs.

    Of a run whose directory only a cluster sees, its present files are brought here first; of one
    on Kubernetes, manifests of a TensorBoard beside the run are printed.
    """
    from pipeline.monitor.serve import serve
    from pipeline.orchestrate.run_control import curves_of, viewer_of

    if text := viewer_of(run, RUNS):
        print(text, end="")
        return
    serve(curves_of(run, RUNS), host, port)
