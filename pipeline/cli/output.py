"""Standard output and standard error that may disappear while a job runs."""

from __future__ import annotations

import errno
import io
import os
import sys
from typing import TextIO, cast

# EPIPE: the reader of a pipe ended, for example `tee`, which the same Ctrl-C ends.
# EIO: the terminal was closed.
_GONE = (errno.EPIPE, errno.EIO)


class LastingStream:
    """A text stream whose reader may disappear: what is written afterwards is dropped.

    A stop request often takes the reader along. The job must still write its checkpoint and its
    state, which an error of a mere message would prevent.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> object:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Write, or drop, ``text``; returns its length."""
        try:
            self._stream.write(text)
        except OSError as error:
            self._drop(error)
        return len(text)

    def flush(self) -> None:
        """Write what is buffered, or drop it."""
        try:
            self._stream.flush()
        except OSError as error:
            self._drop(error)

    def _drop(self, error: OSError) -> None:
        """Send what follows to the null device. Raises any other error, such as a full disk."""
        if error.errno not in _GONE:
            raise error
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, self._stream.fileno())
        os.close(null)


def keep_output_alive() -> None:
    """Make the standard streams of this process survive their readers, and any text."""
    sys.stdout = cast(TextIO, LastingStream(_open_stream(sys.stdout)))
    sys.stderr = cast(TextIO, LastingStream(_open_stream(sys.stderr)))


def _open_stream(stream: TextIO | None) -> TextIO:
    """The stream, or the null device if whoever started this process has closed it (`>&-`)."""
    if stream is None:
        return open(os.devnull, "w", encoding="utf-8", errors="backslashreplace")
    # Names of files need not fit the encoding of the terminal, or any encoding.
    if isinstance(stream, io.TextIOWrapper):
        stream.reconfigure(errors="backslashreplace")
    return stream
