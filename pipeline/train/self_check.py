"""The self-check of exact columns during training, and the reaction to a mismatch.

The inversion of reversible columns must recover its inputs exactly. If it does not, arithmetic was
wrong somewhere (usually a hardware fault), and the gradients cannot be used. The network then makes
them non-finite, so every engine skips the update on all ranks without waiting for the device. Only
after such a skip is anything read back.

``on_mismatch`` in the job decides what follows: retry the step, warn and train with the gradients,
or stop.
"""

from __future__ import annotations

import socket
from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

from pipeline.errors import StageError
from pipeline.model import Network
from pipeline.model.consistency import Consistency
from pipeline.model.fixed_point import MAX_INTEGER

MAX_RETRIES = 3  # of one step


@dataclass(frozen=True, kw_only=True)
class Mismatch:
    """What one rank found wrong: ``lines`` as ``Consistency.report`` gives them.

    ``retryable``: the same images may succeed a second time. False after an overflow of the stream,
    which depends on the weights and the images only and would come again.
    """

    rank: int
    host: str
    lines: list[str]
    retryable: bool

    def __str__(self) -> str:
        # The first line names the origin; the others are usually its consequences.
        others = len(self.lines) - 1
        suffix = f" (and {others} more findings)" if others else ""
        return f"{self.lines[0]}{suffix}, on rank {self.rank}, host {self.host}"


class SelfCheck:
    """Collects the network's consistency records over micro-batches, on the device."""

    def __init__(
        self,
        network: Network,
        on_mismatch: Literal["retry", "warn", "stop"],
        device: torch.device,
    ) -> None:
        self.network = network
        self.on_mismatch = on_mismatch
        self.device = device
        # The engine skips steps whose gradients are not finite, and the trainer reports them.
        network.skip_on_overflow = True
        network.skip_on_mismatch = on_mismatch != "warn"
        self._collected: Consistency | None = None
        self._warn_from = 0.25  # of the range of the stream

    def add(self) -> Tensor:
        """Add the record of the last micro-batch; its mismatched elements (int64 scalar).

        Does not wait for the device. Call it between the backward pass and the next forward pass,
        which starts a new record.
        """
        if self.network.spec.activations != "exact":
            # Only exact columns check themselves.
            return torch.zeros((), dtype=torch.int64, device=self.device)
        newest = self.network.consistency
        mismatched = newest.mismatched_elements
        if self._collected is None:
            self._collected = newest
        else:
            self._collected.add(newest)
        return mismatched

    def summary(self, mismatched: bool) -> tuple[list[float], list[Mismatch]]:
        """(largest |value| of the stream per column, mismatches) since the last call, of all ranks.

        The first list is empty if the columns are not exact. Resets the collection. Collective;
        waits for the device.

        Args:
            mismatched: whether any rank counted mismatched elements; if not, they are not read.
        """
        if self._collected is None:
            return [], []
        max_abs = self._collected.max_abs.amax(1)
        dist.all_reduce(max_abs, op=dist.ReduceOp.MAX)
        mismatches = self.read() if mismatched else []
        self._collected = None
        return max_abs.tolist(), mismatches

    def headroom_warning(self, max_abs: float) -> str:
        """A warning each time the stream has grown to half of what is left of its range, or ''."""
        end = MAX_INTEGER / 2**self.network.spec.fraction_bits
        if max_abs < self._warn_from * end:
            return ""
        # 1/4, 1/2, 3/4, 7/8, ... of the range.
        self._warn_from = 0.5 if self._warn_from < 0.5 else (1 + self._warn_from) / 2
        return f"values of the stream have grown to {max_abs:.0f}; from {end:.0f} on steps are lost"

    def read(self) -> list[Mismatch]:
        """Mismatches of all ranks since the last call; resets the collection.

        Collective; waits for the device.
        """
        collected = self._collected
        self._collected = None
        lines = [] if collected is None else collected.report()
        overflowed = collected is not None and bool(collected.overflowed.any())
        own = Mismatch(
            rank=dist.get_rank(),
            host=socket.gethostname(),
            lines=lines,
            retryable=bool(lines) and not overflowed,
        )
        # Every rank gathers all of them, so that all ranks decide alike (``should_retry``).
        gathered: list[Mismatch] = [own] * dist.get_world_size()
        dist.all_gather_object(gathered, own)
        return [mismatch for mismatch in gathered if mismatch.lines]

    def should_retry(self, mismatches: list[Mismatch], step: int, attempt: int) -> bool:
        """Whether to retry a skipped step. The answer is the same on every rank.

        Args:
            step: 0-based.
            attempt: how often the step was tried so far, from 1.

        Raises:
            StageError: the job says to stop, or the step failed too often.
        """
        retryable = [mismatch for mismatch in mismatches if mismatch.retryable]
        if not retryable:
            return False
        failed = f"step {step + 1} failed its self-check"
        if self.on_mismatch == "stop":
            raise StageError(
                f"{failed}: {retryable[0]}",
                remedy="the update was not applied: rerun the same command, on another machine if "
                "this one has failed before",
            )
        # A fault that stays is not a random bit flip: broken hardware, or an operation that gives
        # other results in the backward pass than in the forward pass.
        if attempt > MAX_RETRIES:
            raise StageError(
                f"{failed} {attempt} times in a row: {retryable[0]}",
                remedy="check the machine's hardware, or find the operation that is not "
                "deterministic; on_mismatch: warn trains despite mismatches",
            )
        return True
