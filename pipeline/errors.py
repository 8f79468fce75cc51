"""The few errors that a user can meet. Each names a place, a cause and a remedy, and carries an exit code."""

from __future__ import annotations


class PipelineError(Exception):
    """Base of all errors with a message meant for the user; anything else is a bug (exit code 70)."""

    exit_code = 3

    def __init__(self, cause: str, *, place: str = "", remedy: str = "") -> None:
        self.cause, self.place, self.remedy = cause, place, remedy
        super().__init__(self.message)

    @property
    def message(self) -> str:
        """One paragraph: ``place: cause`` and, on a line of its own, the remedy."""
        head = f"{self.place}: {self.cause}" if self.place else self.cause
        return f"{head}\n  -> {self.remedy}" if self.remedy else head

    def __reduce__(self) -> tuple[object, ...]:  # keyword arguments survive the way through Ray
        return (_rebuild, (type(self), self.cause, self.place, self.remedy))


def _rebuild(kind: type[PipelineError], cause: str, place: str, remedy: str) -> PipelineError:
    return kind(cause, place=place, remedy=remedy)


class ConfigError(PipelineError):
    """The job file, a referenced file or an override is wrong; nothing has been started."""

    exit_code = 2


class DataError(PipelineError):
    """Input data is missing or unusable."""

    exit_code = 2


class StageError(PipelineError):
    """A stage failed while running."""

    exit_code = 3


class CheckpointError(PipelineError):
    """A checkpoint or weights file is missing, damaged or of another model."""

    exit_code = 3


class Interrupted(PipelineError):
    """The run was asked to stop; the same command goes on where it stopped."""

    exit_code = 75
