"""Turns exceptions that are the user's to solve into errors with a remedy."""

from __future__ import annotations

import errno

from pipeline.errors import PipelineError, StageError

RERUN = "rerun the same command to resume"  # the remedy of everything that can be resumed


def user_error(error: BaseException) -> PipelineError | None:
    """The error to show to the user, or None for an exception that is a bug of the pipeline."""
    if isinstance(error, PipelineError):
        return error
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return StageError(
            "the disk is full",
            place=str(error.filename or ""),
            remedy=f"free some space, then {RERUN}",
        )
    return None
