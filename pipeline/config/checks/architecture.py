"""Check that a weights file is of the job's network."""

from __future__ import annotations

from pipeline.checkpoint.description import WeightsDescription
from pipeline.checkpoint.weights_source import weights_source
from pipeline.config.checks.checker import Checker
from pipeline.config.shipped_models import architecture, model_named
from pipeline.errors import CheckpointError


def check_architecture(checker: Checker, stage: str, initial: str) -> None:
    """Report every key of the model in which the file's network differs from the job's."""
    try:
        description = WeightsDescription.read(*weights_source(initial))
    except CheckpointError as error:
        checker.report(f"stages.{stage}.from", f"{error.place}: {error.cause}", error.remedy)
        return
    if not description.network:
        return  # not known before the parameters are compared one by one
    of_file = architecture(description.network)
    of_job = architecture(checker.job.model.model_dump(mode="json"))
    # The name of a shipped model says more than a list of widths.
    name = model_named(of_file)
    for key, value in of_file.items():
        if value != of_job[key]:
            cause = f"the job has {_text(of_job[key])}, the weights of stages.{stage}.from "
            remedy = f"model: {name}" if name else f"model.{key}: {_text(value)}"
            checker.report(f"model.{key}", f"{cause}{_text(value)}", remedy)


def _text(value: object) -> str:
    """A value as a job file spells it."""
    return str(value).lower() if isinstance(value, bool) else str(value)
