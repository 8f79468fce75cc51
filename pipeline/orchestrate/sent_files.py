"""A folder as text, for a cluster whose only way back to this machine is the output of a job.

Format: lines of base64 between two marks, then the digest of the archive (tar, gzip)::

    -----BEGIN FILES-----
    H4sIAAAA...
    -----END FILES 3f786850e387550f-----
"""

from __future__ import annotations

import base64
import io
import re
import shutil
import tarfile
import tempfile
from collections.abc import Callable
from pathlib import Path

from pipeline.errors import ConfigError, StageError
from pipeline.files import digest

_BEGIN = "-----BEGIN FILES-----"
_END = "-----END FILES {}-----"
_PACKED = re.compile(r"-----BEGIN FILES-----\n(.*?)-----END FILES ([0-9a-f]+)-----", re.DOTALL)
_LINE = 4096  # characters


def pack(folder: Path, write: Callable[[str], object]) -> None:
    """Write the files of a folder as text.

    Raises:
        ConfigError: there is no such folder.
    """
    if not folder.is_dir():
        raise ConfigError("the run has no such files yet", place=str(folder))
    # In memory: the text travels through the log of a job, which bounds the size far below.
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w:gz", compresslevel=1) as tar:
        tar.add(folder, arcname=".")
    data = archive.getvalue()
    text = base64.b64encode(data).decode()
    write(f"{_BEGIN}\n")
    for start in range(0, len(text), _LINE):
        write(f"{text[start : start + _LINE]}\n")
    write(f"{_END.format(digest(data))}\n")


def unpack(text: str, folder: Path) -> None:
    """Write the files in ``text`` to a folder, whose earlier content they replace as a whole.

    Raises:
        StageError: the text is incomplete or damaged.
    """
    packed = _PACKED.search(text)
    data = base64.b64decode(packed[1]) if packed else b""
    if packed is None or digest(data) != packed[2]:
        raise StageError(
            "the files did not arrive complete",
            place=str(folder),
            remedy="run the same command again, or copy the folder from the cluster yourself",
        )
    folder.parent.mkdir(parents=True, exist_ok=True)
    # Beside the folder, so that the rename stays within one file system.
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        tar.extractall(temporary, filter="data")  # nothing outside of the folder, no devices
    replace_folder(temporary, folder)


def replace_folder(new: Path, folder: Path) -> None:
    """Put ``new`` in the place of a folder."""
    old = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    new.rename(folder)
    shutil.rmtree(old, ignore_errors=True)
