"""Turns exceptions that are the user's to solve into errors with a remedy."""

from __future__ import annotations

import errno
import os
from pathlib import Path

from pipeline.errors import ConfigError, PipelineError, StageError

# The user, the mount or the path does not permit what a command has to do.
_REFUSED = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG}
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
    if isinstance(error, OSError) and error.errno in _REFUSED and error.filename:
        path = Path(os.fsdecode(error.filename)).absolute()
        # A file is first written under a temporary name, which tells the user nothing.
        is_temporary = path.name.startswith(".") and path.suffix == ".tmp"
        return ConfigError(
            f"cannot be used: {error.strerror}",
            place=str(path.parent if is_temporary else path),
            remedy="correct its permissions, or choose another path (--run-dir for a run, --out "
            "for an image)",
        )
    return None
