"""The application with all its commands."""

from __future__ import annotations

import typer

from pipeline.cli import bench, checks, config, job, model, prepared_data, tensorboard

app = typer.Typer(
    help="Large-scale vision pretraining: prepare, pretrain, fine-tune, evaluate, export.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,  # main() reports errors
)

# Registered here, not by decorators in the modules: the order is that of --help.
app.command("run", epilog=job.SHIPPED_JOBS)(job.run)
app.command("train")(job.train)
app.command("verify")(prepared_data.verify)
app.command("predict")(model.predict)
app.command("schema")(config.schema)
app.command("explain")(config.explain)
app.command("tensorboard")(tensorboard.tensorboard)
app.command("test", context_settings=checks.PASS_ON_ARGUMENTS)(checks.test)
app.add_typer(bench.app, name="bench")
app.add_typer(prepared_data.app, name="data")
