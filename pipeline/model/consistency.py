"""What a pass through exact columns finds out about itself. All on the device: reading it is the reader's business."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from pipeline.model.fixed_point import fingerprint

KEPT = (
    *(f"level {i} of the kept column of the stream" for i in range(4)),
    "the stem's output",
    "a tensor kept for the stem or a head",
    "the stochastic-depth factors",
)


class Consistency:
    """Findings of one forward and backward pass.

    ``mismatched`` (columns, 4), int64: elements that the inversion of this column and level proves wrong, plus one where
    the map that it recovers is not the one of the forward pass. ``kept`` (7,): kept tensors that changed, as named in
    ``KEPT``. ``largest`` (columns, 4), float64: largest |value|; where it is beyond ``limit``, or NaN, the stream is not.
    ``narrow`` (columns, 4): remainders that did not fit the width they were given. ``limit``: range of the stream.
    """

    def __init__(self, columns: int, device: torch.device, fraction_bits: int) -> None:
        self.mismatched = torch.zeros(columns, 4, dtype=torch.int64, device=device)
        self.saved_tensor_changed = torch.zeros(len(KEPT), dtype=torch.int64, device=device)
        self.max_abs = torch.zeros(columns, 4, dtype=torch.float64, device=device)
        self.remainder_overflow = torch.zeros(columns, 4, dtype=torch.bool, device=device)
        self.fraction_bits = fraction_bits
        self.limit = 2.0 ** (31 - fraction_bits)

    @property
    def mismatched_elements(self) -> Tensor:
        """Everything that was found to differ (int64 scalar)."""
        return self.mismatched.sum() + self.saved_tensor_changed.sum()

    @property
    def overflowed(self) -> Tensor:
        """(columns, 4) bool: the stream is at the end of its range, or F was not finite."""
        return ~(self.max_abs < self.limit * (1 - 2.0**-30))

    def nonfinite_flag(self, mismatches: bool) -> Tensor:
        """inf where the gradients must not be used: after an overflow, after a narrow remainder and, if ``mismatches``, where
        elements differ; else 0. Added to a gradient, it makes every engine skip the step without a synchronisation."""
        wrong = self.overflowed.any() | self.remainder_overflow.any()
        return torch.where(
            wrong | (self.mismatched_elements > 0) if mismatches else wrong, torch.inf, 0.0
        )

    def add(self, other: Consistency) -> None:
        """Take in what another pass (of the same network) found."""
        self.mismatched += other.mismatched
        self.saved_tensor_changed += other.saved_tensor_changed
        self.max_abs = torch.maximum(self.max_abs, other.max_abs)
        self.remainder_overflow = self.remainder_overflow | other.remainder_overflow

    def report(self) -> list[str]:
        """One line a finding, where it began first (synchronises). The inversion goes from the last column and level to the
        first, so the first line names the origin and later ones its consequences."""
        changed = zip(KEPT, self.saved_tensor_changed.tolist(), strict=True)
        lines = [f"{name} changed between forward and backward" for name, n in changed if n]
        mismatched, largest = self.mismatched.tolist(), self.max_abs.tolist()
        overflowed, narrow = self.overflowed.tolist(), self.remainder_overflow.tolist()
        columns = range(len(mismatched))
        for t, i in ((t, i) for t in columns for i in range(4)):
            if overflowed[t][i]:
                lines.append(
                    f"column {t}, level {i}: |value| is {largest[t][i]:.6g}, the stream ends at {self.limit:g}; "
                    f"set model.fraction_bits below {self.fraction_bits} (wider, coarser), or lower the learning rate"
                )
            if narrow[t][i]:
                lines.append(
                    f"column {t}, level {i}: alpha became too small for the remainder's width: set widths more often"
                )
        for t, i in ((t, i) for t in reversed(columns) for i in (3, 2, 1, 0)):
            if mismatched[t][i]:
                lines.append(
                    f"column {t}, level {i}: {mismatched[t][i]} elements differ from the forward pass"
                )
        return lines


@contextmanager
def guarded(health: Consistency, part: torch.nn.Module, skip_on_mismatch: bool) -> Iterator[None]:
    """Tensors that autograd keeps of ``part``, run inside, are compared with themselves when the backward pass asks for
    them; one that changed is counted and, if ``skip_on_mismatch``, made non-finite, so that the step is skipped. Its parameters and
    buffers (which BatchNorm updates) are not among them."""
    own = {buffer.untyped_storage().data_ptr() for buffer in part.buffers()}

    def pack(kept: Tensor) -> tuple[Tensor, Tensor | None]:
        parameter = isinstance(kept, torch.nn.Parameter) or isinstance(
            kept._base, torch.nn.Parameter
        )
        if parameter or kept.numel() == 0 or kept.untyped_storage().data_ptr() in own:
            return kept, None
        return kept, fingerprint(kept)

    def unpack(packed: tuple[Tensor, Tensor | None]) -> Tensor:
        kept, expected = packed
        if expected is None:
            return kept
        changed = fingerprint(kept) != expected
        health.saved_tensor_changed[5] += changed
        return (
            torch.where(changed, torch.nan, kept)
            if skip_on_mismatch and kept.is_floating_point()
            else kept
        )

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield
