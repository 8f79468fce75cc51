"""Consistency record of one training pass through exact columns: does the inversion reproduce it?

The backward pass inverts every column. The inversion must end at the inputs of the forward pass, so
it doubles as a checksum of the whole network: a non-deterministic kernel, a memory error or an
arithmetic fault between forward and backward shows up as mismatched elements.

Example: one bit of a saved remainder of column 5, level 2 flips between forward and backward. Its
decoded value is off by one integer, so the checksum of the recovered map of column 4, level 2
differs from that of the forward pass:

    mismatched[5, 2]     > 0, and so are columns and levels that are inverted after it
    report()[0]          = "column 5, level 2: 1 elements differ from the forward pass"
    nonfinite_flag(...)  = inf; added to a gradient, it makes the engine skip this step on all ranks

All fields are tensors on the device. Reading them synchronises; the caller decides when.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from pipeline.model.fixed_point import checksum

# What is compared with its checksum of the forward pass, apart from the inversion.
# The positions are those in ``Consistency.saved_tensor_changed``.
SAVED_TENSORS = (
    "level 0 of the saved column of the stream",
    "level 1 of the saved column of the stream",
    "level 2 of the saved column of the stream",
    "level 3 of the saved column of the stream",
    "the stem's output",
    "a tensor saved for the stem or a head",
    "the stochastic-depth factors",
)
STEM_OUTPUT = 4
STEM_OR_HEAD = 5
DROP_PATH_SCALES = 6


class Consistency:
    """Result of the checks of one forward and backward pass.

    Attributes:
        mismatched: (columns, 4) int64. Elements that the inversion of this column and level proves
            wrong, plus one if the checksum of the map that it recovers is not the forward pass's.
        saved_tensor_changed: (7,) int64. Number of changed saved tensors, by ``SAVED_TENSORS``.
        max_abs: (columns, 4) float64. Largest |value|; at ``limit`` or above, or NaN, the stream
            is saturated.
        remainder_overflow: (columns, 4) bool. alpha was too small for the width of the remainders.
        limit: end of the stream's range.
    """

    def __init__(self, columns: int, device: torch.device, fraction_bits: int) -> None:
        self.mismatched = torch.zeros(columns, 4, dtype=torch.int64, device=device)
        self.saved_tensor_changed = torch.zeros(
            len(SAVED_TENSORS), dtype=torch.int64, device=device
        )
        self.max_abs = torch.zeros(columns, 4, dtype=torch.float64, device=device)
        self.remainder_overflow = torch.zeros(columns, 4, dtype=torch.bool, device=device)
        # int32 has 31 bits beside the sign. Example: 18 fraction bits leave 13, so +-8192.
        self.fraction_bits = fraction_bits
        self.limit = 2.0 ** (31 - fraction_bits)

    @property
    def mismatched_elements(self) -> Tensor:
        """Total of all mismatches (int64 scalar)."""
        return self.mismatched.sum() + self.saved_tensor_changed.sum()

    @property
    def overflowed(self) -> Tensor:
        """(columns, 4) bool: the stream reached the end of its range, or F was not finite."""
        # Negated, so that NaN counts as overflow: every comparison with NaN is false.
        return ~(self.max_abs < self.limit * (1 - 2.0**-30))

    def invalid(self, *, overflows: bool, mismatches: bool) -> Tensor:
        """Return a bool scalar: whether the gradients of this pass must not be used.

        They must not be used after an overflow of the stream or of a remainder (``overflows``), or
        after a mismatch (``mismatches``).
        """
        invalid = torch.zeros((), dtype=torch.bool, device=self.max_abs.device)
        if overflows:
            invalid = invalid | self.overflowed.any() | self.remainder_overflow.any()
        if mismatches:
            invalid = invalid | (self.mismatched_elements > 0)
        return invalid

    def nonfinite_flag(self, *, overflows: bool, mismatches: bool) -> Tensor:
        """Return inf if the gradients must not be used (see ``invalid``), else 0.

        Adding the flag to a gradient makes every engine that looks for non-finite gradients skip
        the step, without a synchronisation.
        """
        # where, not an if: an if would wait for the device.
        return torch.where(self.invalid(overflows=overflows, mismatches=mismatches), torch.inf, 0.0)

    def add(self, other: Consistency) -> None:
        """Merge the record of another pass of the same network into this one."""
        self.mismatched += other.mismatched
        self.saved_tensor_changed += other.saved_tensor_changed
        self.max_abs = torch.maximum(self.max_abs, other.max_abs)
        self.remainder_overflow = self.remainder_overflow | other.remainder_overflow

    def report(self) -> list[str]:
        """Return one line per problem, its origin first. Synchronises with the device.

        The inversion runs from the last column and level to the first, so the first mismatch in
        that order is the origin, and the later ones are its consequences.
        """
        changed = zip(SAVED_TENSORS, self.saved_tensor_changed.tolist(), strict=True)
        lines = [f"{name} changed between forward and backward" for name, count in changed if count]
        return [*lines, *self._overflow_lines(), *self._mismatch_lines()]

    def _overflow_lines(self) -> list[str]:
        """Overflows begin in the forward pass: first column and level first."""
        max_abs = self.max_abs.tolist()
        overflowed = self.overflowed.tolist()
        remainder_overflow = self.remainder_overflow.tolist()
        lines = []
        for t in range(len(max_abs)):
            for i in range(4):
                if overflowed[t][i]:
                    lines.append(
                        f"column {t}, level {i}: |value| is {max_abs[t][i]:.6g}, the stream ends "
                        f"at {self.limit:g}; set model.fraction_bits below {self.fraction_bits} "
                        "(larger range, coarser step), or lower the learning rate"
                    )
                if remainder_overflow[t][i]:
                    lines.append(
                        f"column {t}, level {i}: alpha became too small for its remainder width; "
                        "lower log_every_steps (widths are updated that often)"
                    )
        return lines

    def _mismatch_lines(self) -> list[str]:
        mismatched = self.mismatched.tolist()
        return [
            f"column {t}, level {i}: {mismatched[t][i]} elements differ from the forward pass"
            for t in reversed(range(len(mismatched)))
            for i in (3, 2, 1, 0)
            if mismatched[t][i]
        ]


@contextmanager
def check_saved_tensors(
    consistency: Consistency, part: torch.nn.Module, skip_on_mismatch: bool
) -> Iterator[None]:
    """Check the tensors that autograd saves while ``part`` runs inside this context.

    Each tensor's checksum is taken when autograd saves it and compared when the backward pass reads
    it. A changed tensor is counted and, if ``skip_on_mismatch``, replaced by NaN, so that the
    engine skips the step. Parameters are not checked, and neither are buffers: BatchNorm updates
    them in place.
    """
    buffers = {buffer.untyped_storage().data_ptr() for buffer in part.buffers()}

    def pack(tensor: Tensor) -> tuple[Tensor, Tensor | None]:
        # _base: the tensor that a view was taken of. A transposed weight is still a parameter.
        is_parameter = isinstance(tensor, torch.nn.Parameter) or isinstance(
            tensor._base, torch.nn.Parameter
        )
        if is_parameter or tensor.numel() == 0 or tensor.untyped_storage().data_ptr() in buffers:
            return tensor, None
        return tensor, checksum(tensor)

    def unpack(packed: tuple[Tensor, Tensor | None]) -> Tensor:
        tensor, expected = packed
        if expected is None:
            return tensor
        changed = checksum(tensor) != expected
        consistency.saved_tensor_changed[STEM_OR_HEAD] += changed
        if skip_on_mismatch and tensor.is_floating_point():
            return torch.where(changed, torch.nan, tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield
