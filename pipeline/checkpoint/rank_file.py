"""One rank's file of a checkpoint, as it lies in the host's memory and on the disk.

A training step changes the state in place, so what is written behind it must be a copy. All ranges
that the rank owns are copied into one buffer, in the order of the file::

    8 bytes     length of the header
    header      JSON: {"master|stem.weight": {"dtype": "F32", "shape": [30], ...}, ...}
    buffer      all values, fp32, one range after the other

That is the format safetensors. Its library would copy everything once more and hold Python's lock
meanwhile; writing the buffer itself, in blocks, lets training steps run beside it.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import torch
import xxhash
from torch import Tensor

from pipeline.checkpoint.manifest import FileRecord, TensorSlice
from pipeline.files import write_with

# Parameter name, its global shape, offset in the flattened parameter, kind, values (1-D).
Owned = tuple[str, tuple[int, ...], int, str, Tensor]

_LENGTH = struct.Struct("<Q")
_BLOCK = 8 << 20  # bytes per write; Python's lock is free while one is written or digested


@dataclass(kw_only=True)
class RankReport:
    """Contents of one rank's file; or, in ``failure``, why the file could not be written."""

    failure: str | None = None
    host: str = ""
    shapes: dict[str, list[int]] = field(default_factory=dict)
    kinds: list[str] = field(default_factory=list)
    slices: list[TensorSlice] = field(default_factory=list)
    files: dict[str, FileRecord] = field(default_factory=dict)


class HostCopy:
    """The ranges that a rank owns, copied to the host. The buffer is kept for the next checkpoint.

    Args:
        rank: of this process; it names the file.
        pin_memory: page-locked memory, to which a GPU copies several times faster.
    """

    def __init__(self, rank: int, *, pin_memory: bool) -> None:
        self._name = f"rank-{rank:05d}.safetensors"
        self._pin_memory = pin_memory
        self._buffer = torch.empty(0)
        self._header = b""
        self._report = RankReport()

    def take(self, owned: Iterable[Owned]) -> None:
        """Copy the present values; waits until the device has delivered them."""
        ranges = list(owned)
        total = sum(values.numel() for *_, values in ranges)
        # The first touch of new memory costs more than the copy, so one buffer serves all copies.
        if self._buffer.numel() != total:
            self._buffer = torch.empty(total, pin_memory=self._pin_memory)
        entries: dict[str, object] = {}
        # A range is listed once, although each kind (master, exp_avg, ...) stores values for it.
        slices: dict[tuple[str, int], TensorSlice] = {}
        report = RankReport(host=os.uname().nodename)
        start = 0
        for parameter, shape, offset, kind, values in ranges:
            length = values.numel()
            self._buffer[start : start + length].copy_(values.detach(), non_blocking=True)
            entries[f"{kind}|{parameter}"] = {
                "dtype": "F32",
                "shape": [length],
                "data_offsets": [4 * start, 4 * (start + length)],
            }
            slices[parameter, offset] = TensorSlice(
                name=parameter, offset=offset, length=length, file=self._name
            )
            report.shapes[parameter] = list(shape)
            if kind not in report.kinds:
                report.kinds.append(kind)
            start += length
        report.slices = list(slices.values())
        text = json.dumps(entries, separators=(",", ":")).encode()
        # Spaces fill the header, so that the values begin at a multiple of 8 bytes.
        self._header = text.ljust(-(-len(text) // 8) * 8)
        self._report = report
        if self._pin_memory:
            torch.cuda.current_stream().synchronize()

    @property
    def bytes(self) -> int:
        """Size of the file."""
        return _LENGTH.size + len(self._header) + 4 * self._buffer.numel()

    def write(self, directory: Path) -> RankReport:
        """Write the file, durably; no file if the rank owns nothing. Raises OSError."""
        report = self._report
        if not report.slices:
            return report
        digest = xxhash.xxh3_128()

        def write(temporary: Path) -> None:
            values = self._buffer.numpy().data.cast("B")
            with open(temporary, "wb", buffering=0) as file:
                for part in (_LENGTH.pack(len(self._header)), self._header, values):
                    for start in range(0, len(part), _BLOCK):
                        _write_all(file.fileno(), part[start : start + _BLOCK])
                        digest.update(part[start : start + _BLOCK])

        # The digest is that of the values in memory: whatever the disk makes of them is noticed.
        write_with(directory / self._name, write)
        report.files = {self._name: {"bytes": self.bytes, "xxh3": digest.hexdigest()}}
        return report


def _write_all(descriptor: int, data: bytes | memoryview) -> None:
    """Write every byte: the system may take a part of a block only, at the end of a quota."""
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]
