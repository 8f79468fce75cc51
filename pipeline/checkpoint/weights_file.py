"""Weights files that carry their own digest: ordinary safetensors, checked wherever they are read.

The digest stands in the file's header, so it survives copying and renaming, and no second file can
be lost. A file layout of safetensors:

    8 bytes      length of the header
    header       JSON: {"__metadata__": {"xxh3_128": "5f3a..."}, "stem.weight": {...}, ...}
    data         the tensors

A file cannot contain its own digest, so the digest is that of the whole file with 32 zeros in its
place. Files from elsewhere have none and are read unchecked.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import IO

import xxhash
from safetensors.torch import save_file
from torch import Tensor

from pipeline.errors import CheckpointError
from pipeline.files import BLOCK, write_with

DIGEST_KEY = "xxh3_128"
_NO_DIGEST = "0" * 32
_LENGTH = struct.Struct("<Q")
_LONGEST_HEADER = 100_000_000  # bytes; safetensors refuses a longer one too


def write_weights_file(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write tensors as safetensors with a digest, atomically.

    Raises:
        OSError, SafetensorError: the file cannot be written.
    """
    labels = {**(metadata or {}), DIGEST_KEY: _NO_DIGEST}

    def write(temporary: Path) -> None:
        save_file(dict(tensors), temporary, metadata=labels)
        with open(temporary, "rb+") as file:
            _insert_digest(file)

    write_with(path, write)


def verify_weights_file(path: Path) -> None:
    """Compare a weights file with the digest that it carries. A file without one passes.

    Raises:
        CheckpointError: the content differs from its digest, or is no safetensors file.
    """
    remedy = "rerun the stage that writes it, or copy the file again"
    try:
        with open(path, "rb") as file:
            header = _read_header(file)
            digest = _metadata(header).get(DIGEST_KEY)
            intact = digest is None or _digest(file, header, digest) == digest
    except (OSError, ValueError) as error:
        cause = f"cannot be read ({error})"
        raise CheckpointError(cause, place=str(path), remedy=remedy) from None
    if not intact:
        cause = "checksum mismatch: the file changed after it was written"
        raise CheckpointError(cause, place=str(path), remedy=remedy)


def _insert_digest(file: IO[bytes]) -> None:
    header = _read_header(file)
    entries = json.loads(header)
    # safetensors writes the metadata in random order. Sorted, equal tensors give equal files.
    entries["__metadata__"] = dict(sorted(_metadata(header).items()))
    for digest in (_NO_DIGEST, None):  # first the header without the digest, for the digest of it
        entries["__metadata__"][DIGEST_KEY] = digest or _digest(file, header, _NO_DIGEST)
        text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False)
        # Spaces fill the header to its length, as the format allows.
        header = text.encode().ljust(len(header))
        file.seek(_LENGTH.size)
        file.write(header)


def _digest(file: IO[bytes], header: bytes, digest: str) -> str:
    """Digest of a file as it is without ``digest`` in its header."""
    state = xxhash.xxh3_128(_LENGTH.pack(len(header)))
    state.update(header.replace(digest.encode(), _NO_DIGEST.encode(), 1))
    file.seek(_LENGTH.size + len(header))
    while block := file.read(BLOCK):
        state.update(block)
    return state.hexdigest()


def _read_header(file: IO[bytes]) -> bytes:
    """The bytes of the header; raises ValueError if there is none."""
    file.seek(0)
    start = file.read(_LENGTH.size)
    length = _LENGTH.unpack(start)[0] if len(start) == _LENGTH.size else 0
    header = file.read(length) if 0 < length <= _LONGEST_HEADER else b""
    if not header or len(header) != length:
        raise ValueError("not a safetensors file")
    return header


def _metadata(header: bytes) -> dict[str, str]:
    entries = json.loads(header)
    metadata = entries.get("__metadata__", {}) if isinstance(entries, dict) else None
    if not isinstance(metadata, dict):
        raise ValueError("not a safetensors file")
    return metadata
