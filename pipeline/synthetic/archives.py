"""Write tars and folders: complete or absent, and with the same bytes every time."""

from __future__ import annotations

import io
import os
import shutil
import tarfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import IO

from pipeline.files import fsync_dir, temporary_name

Members = Iterable[tuple[str, bytes]]  # name, content


def write_tar(file: IO[bytes], members: Members) -> None:
    with _new_tar(file) as tar:
        for name, data in members:
            tar.addfile(_header(name, len(data)), io.BytesIO(data))


def nest_tars(file: IO[bytes], tars: Sequence[Path]) -> None:
    """Write a tar that contains the tars themselves, as ImageNet's training archive does."""
    with _new_tar(file) as outer:
        for path in tars:
            with open(path, "rb") as inner:
                outer.addfile(_header(path.name, path.stat().st_size), inner)


def join_tars(file: IO[bytes], tars: Sequence[Path]) -> None:
    """Write one tar of the members of several, as ImageNet's validation archive."""
    with _new_tar(file) as outer:
        for path in tars:
            with tarfile.open(path) as inner:
                for member in inner:
                    outer.addfile(member, inner.extractfile(member))


def write_folder(path: Path, members: Members) -> None:
    """Write a folder under a temporary name, then rename it: it appears complete, or not at all."""
    temporary = path.with_name(temporary_name(path.name))
    temporary.mkdir(parents=True)
    try:
        for name, data in members:
            with open(temporary / name, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
        # The entries first, then the rename: after a power failure, the new name never shows an
        # emptier folder.
        fsync_dir(temporary)
        os.replace(temporary, path)
        fsync_dir(path.parent)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _new_tar(file: IO[bytes]) -> tarfile.TarFile:
    return tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT)


def _header(name: str, size: int) -> tarfile.TarInfo:
    """A header without time and user (the defaults of TarInfo): the bytes are reproducible."""
    header = tarfile.TarInfo(name)
    header.size = size
    return header
