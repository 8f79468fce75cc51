"""The errors that a user can meet: each names a place, a cause and a remedy, and has an exit code.

    DataError("has 100 bytes instead of 4096", place="set/train-00000.parquet", remedy="...")

prints as::

    set/train-00000.parquet: has 100 bytes instead of 4096
      -> ...

Any other exception that reaches the top is a bug of the pipeline (exit code 70, with a traceback).
"""

from __future__ import annotations


class PipelineError(Exception):
    """Base class of all errors whose message is meant for the user.

    Args:
        cause: what is wrong, in the present tense.
        place: the file, row, job key or URL that is affected; empty if there is none.
        remedy: what the user can do next; empty if nothing helps.
    """

    exit_code = 3

    def __init__(self, cause: str, *, place: str = "", remedy: str = "") -> None:
        self.cause = cause
        self.place = place
        self.remedy = remedy
        super().__init__(self.message)

    @property
    def message(self) -> str:
        """``place: cause`` and, on a line of its own, the remedy."""
        head = f"{self.place}: {self.cause}" if self.place else self.cause
        return f"{head}\n  -> {self.remedy}" if self.remedy else head

    # By default, unpickling calls the class with the positional arguments of Exception alone. Ray
    # sends errors between processes as pickles, so place and remedy must be part of the recipe.
    def __reduce__(self) -> tuple[object, ...]:
        return (_rebuild, (type(self), self.cause, self.place, self.remedy))


def _rebuild(kind: type[PipelineError], cause: str, place: str, remedy: str) -> PipelineError:
    return kind(cause, place=place, remedy=remedy)


class ConfigError(PipelineError):
    """The job file, a referenced file or an override is wrong; nothing was started."""

    exit_code = 2


class DataError(PipelineError):
    """Input data is missing or unusable."""

    exit_code = 2


class StageError(PipelineError):
    """A stage failed while it ran."""

    exit_code = 3


class CheckpointError(PipelineError):
    """A checkpoint or weights file is missing, damaged or belongs to a different model."""

    exit_code = 3


class DamageError(PipelineError):
    """Files are not as they were written."""

    exit_code = 3


class Interrupted(PipelineError):
    """A stop request ended the run; the same command resumes it."""

    exit_code = 75  # EX_TEMPFAIL of sysexits.h: a later attempt may succeed


class Detached(Interrupted):
    """The command no longer follows a run, which continues on its cluster."""

    exit_code = 130  # as after Ctrl-C
