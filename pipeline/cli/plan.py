"""The command plan: memory, time and bytes of a job before it runs, and afterwards a comparison."""

from __future__ import annotations

from typing import Annotated

import typer

from pipeline.cli.options import Overrides
from pipeline.layout import RUNS

Job = Annotated[
    str,
    typer.Argument(
        metavar="JOB", help="A job file, or the name of a shipped job.", show_default=False
    ),
]
Gpus = Annotated[
    int | None,
    typer.Option(
        min=1,
        metavar="N",
        help="Number of devices, or of processes on a CPU. Default: as the job says.",
        show_default=False,
    ),
]
Device = Annotated[
    str,
    typer.Option(
        metavar="NAME",
        help="h100, h200 or cpu. Default: that of this machine.",
        show_default=False,
    ),
]
Price = Annotated[
    float | None, typer.Option(min=0, help="Price of a device per hour.", show_default=False)
]
Images = Annotated[
    int | None,
    typer.Option(
        min=1, metavar="N", help="Training images, if the job does not tell.", show_default=False
    ),
]
Check = Annotated[
    str,
    typer.Option(
        metavar="RUN",
        help="Compare the forecast of this run with what it measured, instead.",
        show_default=False,
    ),
]


def plan(
    job: Job = "",
    overrides: Overrides = None,
    gpus: Gpus = None,
    device: Device = "",
    price: Price = None,
    images: Images = None,
    check: Check = "",
) -> None:
    """Forecast memory per device, step time, hours, cost and bytes of a job; start nothing.

    Shows which settings fit and which of them is the fastest. Needs neither the images nor a GPU.
    """
    from pipeline.orchestrate import plan_job, run_control
    from pipeline.plan.check_run import check_text

    # Both are optional for the parser, and exactly one of them is meant.
    if bool(job) == bool(check):
        raise typer.BadParameter("give either a job or --check RUN", param_hint="JOB")
    if check:
        print(check_text(run_control.find(check, RUNS)), end="")
        return
    print(
        plan_job.plan(job, overrides or [], gpus=gpus, device=device, price=price, images=images),
        end="",
    )
