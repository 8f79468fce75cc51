"""The command line. ``python -m pipeline JOB.yaml`` is short for ``python -m pipeline run JOB.yaml``."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import traceback
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.text import Text

from pipeline.errors import ConfigError, Interrupted, PipelineError
from pipeline.layout import RunDir

ROOT = Path(__file__).resolve().parents[1]
RUNS = Path("runs")
INTERNAL_ERROR = 70

app = typer.Typer(
    help="Large-scale vision pretraining: prepare, pretrain, fine-tune, evaluate, export.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

bench = typer.Typer(help="Measurements: ratios side by side in one run.", no_args_is_help=True)
app.add_typer(bench, name="bench")
data = typer.Typer(help="Prepared data, to look at.", no_args_is_help=True)
app.add_typer(data, name="data")

JobFile = Annotated[Path, typer.Argument(help="The job file.", show_default=False)]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Change a key of the job; repeatable."),
]
RunDirectory = Annotated[
    Path | None,
    typer.Option("--run-dir", help="The run's directory; default: runs/<name of the job>."),
]
Rehearse = Annotated[
    bool, typer.Option("--rehearse", help="The same job, shrunk to minutes on this machine.")
]


def main() -> None:
    """Run a command; every error that a user can meet ends with its message and its exit code, anything else with 70."""
    arguments = sys.argv[1:]
    if arguments and arguments[0].endswith((".yaml", ".yml")):
        arguments.insert(0, "run")
    errors = Console(stderr=True)
    try:
        app(args=arguments, prog_name="./launch.sh", standalone_mode=True)
    except Interrupted as stopped:
        errors.print(Text(stopped.message, "yellow"), soft_wrap=True)
        sys.exit(stopped.exit_code)
    except PipelineError as error:
        errors.print(Text.assemble(("error: ", "bold red"), error.message), soft_wrap=True)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        errors.print(
            Text("ended at once; the same command goes on from the last checkpoint", "yellow")
        )
        sys.exit(130)
    except Exception as error:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            full = "the disk is full\n  -> free some space; the same command goes on from here"
            errors.print(
                Text.assemble(("error: ", "bold red"), f"{error.filename or 'writing'}: {full}"),
                soft_wrap=True,
            )
            sys.exit(PipelineError.exit_code)
        traceback.print_exc()
        errors.print(
            Text("this is a bug of the pipeline: please report the lines above", "bold red")
        )
        sys.exit(INTERNAL_ERROR)


@app.command()
def run(
    job: JobFile,
    overrides: Overrides = None,
    stage: Annotated[
        list[str] | None, typer.Option("--stage", help="Only this stage; repeatable.")
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Begin the stages named by --stage anew.")
    ] = False,
    rehearse: Rehearse = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the resolved job and its plan; start nothing.")
    ] = False,
    run_dir: RunDirectory = None,
) -> None:
    """Run a job: every stage that is not done yet."""
    from pipeline.config import machine, render
    from pipeline.config.check import check
    from pipeline.config.load import load_job
    from pipeline.orchestrate.job_runner import open_run, run_stages
    from pipeline.orchestrate.summary import summarise

    loaded = load_job(job, overrides or [], rehearse=rehearse)
    directory = RunDir((run_dir or RUNS / loaded.job.name).absolute())
    if dry_run:
        check(loaded.job, machine.world_size(loaded.job.cluster), loaded.origins, directory)
        print(render.dry_run(loaded), end="")
        return
    if force and not stage:
        raise ConfigError(
            "--force needs --stage",
            remedy="name the stage to begin anew, or remove the run's directory",
        )
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 160)
    with open_run(loaded, directory, console) as under_way:
        for note in loaded.notes:
            under_way.log(note)
        run_stages(under_way, stage or [], force=force)
        summarise(under_way)


@app.command()
def train(
    job: JobFile,
    stage: Annotated[str, typer.Option("--stage", help="pretrain or finetune.")],
    overrides: Overrides = None,
    run_dir: RunDirectory = None,
) -> None:
    """Train one stage in this process alone, or as one of torchrun's: needs prepared data, no Ray."""
    from pipeline.config.check import check
    from pipeline.config.load import load_job
    from pipeline.monitor.console import Display, DisplayFeed, polled_in_background
    from pipeline.orchestrate.run_state import run_lock
    from pipeline.orchestrate.signals import StopRequest
    from pipeline.runtime.dist_env import DistEnv
    from pipeline.train.trainer import train_stage

    loaded, world = load_job(job, overrides or []), DistEnv.from_environment()
    directory = RunDir((run_dir or RUNS / loaded.job.name).absolute())
    display = Display(Console(highlight=False))
    stop = StopRequest(lambda text: display.log(text, "warning"))
    stop.install()
    if not world.is_main:
        train_stage(loaded.job, stage, directory, world, stop)
        return
    check(loaded.job, world.size, loaded.origins, directory)
    with (
        run_lock(directory),
        display.stage(stage),
        polled_in_background(DisplayFeed(directory.events(stage), display)),
    ):
        metrics = train_stage(loaded.job, stage, directory, world, stop)
    display.log("  ".join(f"{name} {value:,.4g}" for name, value in metrics.items()))


@app.command()
def verify(
    path: Annotated[Path, typer.Argument(help="A run's directory, or a prepared dataset's.")],
) -> None:
    """Check prepared data: every digest, every image decodable, all counts."""
    from pipeline.config import machine
    from pipeline.errors import DataError
    from pipeline.monitor.console import Display
    from pipeline.orchestrate.ray_session import ray_session
    from pipeline.orchestrate.ray_tasks import map_tasks
    from pipeline.prepare.verify import describe, find_datasets, verify_dataset

    display, problems = Display(Console(highlight=False)), list[str]()
    with ray_session(machine.cores(), 0, started=lambda: None), display.stage("verify"):
        for dataset in find_datasets(path.absolute()):
            found = verify_dataset(dataset, map_tasks, display.progress)
            problems += found
            display.log(f"{describe(dataset)}: {f'{len(found)} problems' if found else 'all well'}")
    if problems:
        listed = "\n".join(f"    {problem}" for problem in problems[:20])
        raise DataError(
            f"{len(problems)} problems:\n{listed}",
            remedy="run the stage prepare again: it mends what is damaged",
        )


@app.command()
def predict(
    export: Annotated[
        Path, typer.Argument(help="The directory of an exported model: runs/<name>/export.")
    ],
    images: Annotated[list[Path], typer.Argument(help="Image files.")],
) -> None:
    """The most probable classes of images, by an exported model."""
    from pipeline.export.reload import load_export

    model = load_export(export)
    for image in images:
        best = ", ".join(
            f"{name} {probability:.1%}" for _, name, probability in model.predict(image, best=3)
        )
        print(f"{image}: {best}")


@app.command()
def schema() -> None:
    """Print the JSON Schema of a job file, for editors."""
    from pipeline.config.schema_text.json_schema import json_schema

    print(json.dumps(json_schema(), indent=2))


@app.command()
def explain(
    key: Annotated[
        str,
        typer.Argument(help="A key such as stages.pretrain.base_lr, or its last part: base_lr."),
    ],
    job: Annotated[
        Path | None,
        typer.Option("--job", help="Tell the value in this job too, and where it comes from."),
    ] = None,
    overrides: Overrides = None,
) -> None:
    """Tell what a key of a job means, its unit and default, and where its present value comes from."""
    from pipeline.config import render
    from pipeline.config.load import load_job

    print(render.explain(key, load_job(job, overrides or []) if job is not None else None))


@app.command()
def tensorboard(
    run: Annotated[str, typer.Argument(help="A run's name or directory; default: all runs.")] = "",
    port: Annotated[int, typer.Option(help="Port.")] = 6006,
    host: Annotated[
        str, typer.Option(help="Address to serve at; anything but loopback is open to the network.")
    ] = "127.0.0.1",
) -> None:
    """Serve TensorBoard for a run."""
    directory = next((path for path in (Path(run), RUNS / run) if run and path.is_dir()), RUNS)
    if (run and directory == RUNS) or not directory.is_dir():
        known = sorted(path.name for path in RUNS.glob("*") if path.is_dir())
        raise ConfigError(
            f"there is no run '{run}'", remedy=f"runs here: {', '.join(known) or 'none'}"
        )
    logs = RunDir(directory).tensorboard()
    logs = logs if logs.is_dir() else directory
    print(
        f"TensorBoard of {logs}: http://{host}:{port}/ (metrics by group: tab Custom Scalars); Ctrl-C ends it",
        flush=True,
    )
    command = [
        sys.executable,
        "-m",
        "tensorboard.main",
        "--logdir",
        str(logs),
        "--host",
        host,
        "--port",
        str(port),
    ]
    os.execv(sys.executable, command)


@data.command("show")
def data_show(
    what: Annotated[
        Path,
        typer.Argument(metavar="RUN_OR_DATASET", help="A job file, a run, or a prepared dataset."),
    ],
    out: Annotated[Path, typer.Option(help="Where to write the picture (PNG).")] = Path("data.png"),
    epoch: Annotated[int, typer.Option(min=0, help="The first epoch shown.")] = 0,
    rows: Annotated[int, typer.Option(min=1, max=64, help="Images.")] = 8,
    stage: Annotated[
        str,
        typer.Option(help="The training stage whose augmentation is shown; default: the first."),
    ] = "",
) -> None:
    """A contact sheet of training images: as stored, augmented in a few epochs, and as the network gets them."""
    from pipeline.data.contact_sheet import contact_sheet, png
    from pipeline.data.dataset import open_dataset
    from pipeline.files import write_bytes
    from pipeline.orchestrate.inspect_target import find

    subject = find(what, RUNS, stage)
    sheet = contact_sheet(open_dataset(subject.dataset), subject.settings, epoch, rows)
    write_bytes(out, png(sheet))
    print(
        f"{out}: {sheet.shape[1]} x {sheet.shape[0]} pixels; {subject.dataset}, {subject.stage or 'default augmentation'}"
    )


@bench.command("reversible")
def bench_reversible(
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write the metrics here too.")
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(help="Draw memory against columns here (SVG).")
    ] = None,
    columns: Annotated[str, typer.Option(help="Numbers of columns.")] = "4,8,16,32",
    precision: Annotated[str, typer.Option(help="fp32 or bf16.")] = "fp32",
    batch: Annotated[int, typer.Option(help="Images.")] = 8,
    rounds: Annotated[
        int, typer.Option(min=1, help="How often each case is timed, in a new process each time.")
    ] = 3,
) -> None:
    """Reversible columns: memory, time and gradients of every mode, side by side, one process a case."""
    from pipeline.bench import reversible

    counts = [int(count) for count in columns.split(",")]
    reversible.main(
        counts, json_path=json_file, plot_path=plot, precision=precision, batch=batch, rounds=rounds
    )


@bench.command("loader")
def bench_loader(
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write the metrics here too.")
    ] = None,
) -> None:
    """Images per second and memory of our loader, of PyTorch's with Pillow, of WebDataset and of Hugging Face's."""
    from pipeline.bench import loader

    loader.main(json_file)


@bench.command("prepare")
def bench_prepare(
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write the metrics here too.")
    ] = None,
) -> None:
    """Images per second of the preparation, against a Pillow process pool, with 1 and 2 workers."""
    from pipeline.bench import prepare

    prepare.main(json_file)


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def test(context: typer.Context) -> None:
    """Run ruff, mypy and the tests; further arguments go to pytest."""
    os.chdir(ROOT)
    checks = [
        [sys.executable, "-m", "ruff", "check", "pipeline", "tests"],
        [sys.executable, "-m", "mypy", "--strict", "pipeline"],
        [
            sys.executable,
            "-m",
            "pytest",
            *(context.args or ["-q", "-n", "2", "--dist", "worksteal"]),
        ],
    ]
    failed = [command[2] for command in checks if subprocess.run(command, check=False).returncode]
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")
