"""Warn once if a network outside the pipeline leaves the stream's range or fails its own check.

The pipeline's trainer reads the consistency record of every step. Other training code does not, so
the network looks at it. The host must not wait for the device:

    CPU    the record is read at once
    CUDA   one flag is copied to the host asynchronously, and read by the first later pass that
           finds the copy complete
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field

import torch
from torch import Tensor

from pipeline.model.consistency import Consistency


@dataclass
class PendingFlag:
    """A flag on its way to the host, and the record that it was computed from."""

    flag: Tensor  # bool scalar in pinned memory
    copied: torch.cuda.Event
    record: Consistency


@dataclass
class StreamWatch:
    """Looks at the records of one network."""

    warned: bool = False
    pending: PendingFlag | None = field(default=None, repr=False)

    def __getstate__(self) -> dict[str, object]:
        # For pickle and deepcopy, which cannot copy an event.
        return {"warned": self.warned, "pending": None}

    def look_at(self, record: Consistency) -> None:
        """Warn if the record shows a problem, unless this network has warned before."""
        if self.warned:
            return
        if record.max_abs.device.type != "cuda":
            if bool(record.invalid(overflows=True, mismatches=True)):
                self._warn(record)
        elif self.pending is None:
            self.pending = _copy_flag(record)
        elif self.pending.copied.query():
            if bool(self.pending.flag):
                self._warn(self.pending.record)
            self.pending = None

    def _warn(self, record: Consistency) -> None:
        self.warned = True
        warnings.warn(
            f"reversible columns: {record.report()[0]} (fraction_bits is an argument of build and "
            "RevCol). Results and gradients of this pass are wrong; this network warns only once",
            RuntimeWarning,
            stacklevel=2,
        )


def _copy_flag(record: Consistency) -> PendingFlag:
    flag = torch.empty((), dtype=torch.bool, pin_memory=True)
    flag.copy_(record.invalid(overflows=True, mismatches=True), non_blocking=True)
    copied = torch.cuda.Event()
    copied.record()
    return PendingFlag(flag, copied, record)
