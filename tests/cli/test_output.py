"""A reader of the output that disappears ends no job."""

from __future__ import annotations

import errno
import io
import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.cli.output import LastingStream

# Prints until told to stop, then reports through a file what became of it.
PROGRAM = """
import pathlib, sys
from pipeline.cli.output import keep_output_alive
from rich.console import Console


keep_output_alive()
console = Console()
print("ready", flush=True)
sys.stdin.readline()
for _ in range(3):
    console.print("a message")
    print("another one", file=sys.stderr, flush=True)
pathlib.Path(sys.argv[1]).write_text("saved")
"""


@pytest.mark.parametrize("reader", ["pipe", "terminal"])
def test_a_job_outlives_the_reader_of_its_output(tmp_path: Path, reader: str) -> None:
    read_end, write_end = os.pipe() if reader == "pipe" else pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, tmp_path / "result"],
        stdin=subprocess.PIPE,
        stdout=write_end,
        stderr=write_end,
        text=True,
        start_new_session=True,
        cwd=Path(__file__).resolve().parents[2],
    )
    os.close(write_end)
    assert os.read(read_end, 5) == b"ready"
    os.close(read_end)
    process.communicate("write\n", timeout=60)
    assert process.returncode == 0
    assert (tmp_path / "result").read_text() == "saved"


def test_a_full_disk_is_still_an_error() -> None:
    class FullDisk(io.StringIO):
        def write(self, text: str) -> int:
            raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        LastingStream(FullDisk()).write("schema")


@pytest.mark.parametrize(
    ("closed", "encoding"), [(">&-", "utf-8"), (">&- 2>&-", "utf-8"), ("", "ascii"), ("", "cp1252")]
)
def test_a_closed_output_and_any_encoding_end_no_job(
    tmp_path: Path, closed: str, encoding: str
) -> None:
    program = r"""
import pathlib, sys
from pipeline.cli.output import keep_output_alive
from rich.console import Console
keep_output_alive()
Console().print("\u4e2d\u6587 caf\udce9.jpg \u2714")
print("\u4e2d\u6587", file=sys.stderr, flush=True)
pathlib.Path(sys.argv[1]).write_text("saved")
"""
    done = subprocess.run(
        ["bash", "-c", f'exec "$@" {closed}', "-", sys.executable, "-c", program, tmp_path / "x"],
        cwd=Path(__file__).resolve().parents[2],
        env=os.environ | {"PYTHONIOENCODING": encoding},
        capture_output=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "x").read_text() == "saved"
