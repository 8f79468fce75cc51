"""What exact columns find out about themselves, and what follows: a step on wrong arithmetic is repeated, or told of.

The network makes the gradients of such a step non-finite, so every engine skips it on all ranks without a synchronisation;
only then is anything read from the device.
"""

from __future__ import annotations

import socket
from dataclasses import dataclass

import torch.distributed as dist

from pipeline.errors import StageError
from pipeline.model import Network
from pipeline.model.consistency import Consistency

REPEATS = 3  # of one step


@dataclass(frozen=True)
class Finding:
    """What one rank found: ``lines`` as ``Consistency.report`` gives them. ``curable``: repeating the step may help."""

    rank: int
    host: str
    lines: list[str]
    curable: bool

    def __str__(self) -> str:
        more = f" (and {len(self.lines) - 1} more findings)" if len(self.lines) > 1 else ""
        return f"{self.lines[0]}{more}, on rank {self.rank}, host {self.host}"


class SelfCheck:
    """Sums the network's health over micro-batches, on the device."""

    def __init__(self, network: Network, on_mismatch: str) -> None:
        self.network, self.on_mismatch = network, on_mismatch
        network.skip_on_mismatch = on_mismatch != "warn"
        self._seen: Consistency | None = None

    def add(self) -> None:
        """What the last micro-batch found; nothing is read from the device."""
        if self.network.spec.activations != "exact":
            return
        if self._seen is None:
            self._seen = self.network.consistency
        else:
            self._seen.add(self.network.consistency)

    def summary(self, mismatched: bool) -> tuple[float, list[Finding]]:
        """(largest |value| of the stream, findings where any rank has ``mismatched`` elements) since the last reading, over
        all ranks (collective, synchronises); starts anew."""
        largest = (
            self.network.consistency.max_abs.new_zeros(())
            if self._seen is None
            else self._seen.max_abs.max()
        )
        dist.all_reduce(largest, op=dist.ReduceOp.MAX)
        findings = self.read() if mismatched else []
        self._seen = None
        return float(largest), findings

    def read(self) -> list[Finding]:
        """Findings of all ranks since the last reading (collective, synchronises); starts anew."""
        seen, self._seen = self._seen, None
        lines = [] if seen is None else seen.report()
        curable = (
            bool(lines) and seen is not None and not bool(seen.overflowed.any())
        )  # which would come again
        findings: list[Finding] = [None] * dist.get_world_size()  # type: ignore[list-item]
        dist.all_gather_object(
            findings, Finding(dist.get_rank(), socket.gethostname(), lines, curable)
        )
        return [finding for finding in findings if finding.lines]

    def repeats(self, findings: list[Finding], step: int, attempt: int) -> bool:
        """Whether a step (1-based, as users count) that was skipped at its ``attempt`` (from 1) is to be done again.

        Raises:
            StageError: it must not be repeated, or was, too often.
        """
        if not any(finding.curable for finding in findings):
            return False
        found = next(str(finding) for finding in findings if finding.curable)
        if self.on_mismatch == "stop":
            remedy = "the step was not taken: run the same command again, on another machine if this one has done it before"
            raise StageError(f"step {step} is wrong: {found}", remedy=remedy)
        if attempt > REPEATS:
            remedy = "take this machine out of use, or find what is not deterministic; on_mismatch: warn trains regardless"
            raise StageError(
                f"step {step} is wrong, {attempt} times in a row: {found}", remedy=remedy
            )
        return True
