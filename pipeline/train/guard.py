"""The guard of a training stage: bad steps are skipped, repeated ones end in a rewind or a report.

A step is bad if its loss or gradients are not finite, or if it is a spike: its loss or gradient
norm is far above those of the last ``window`` applied steps. The engine judges before it updates,
where it reads the gradient norm anyway, so nothing else waits for the device. It refuses the update
on all ranks alike.

More than ``max_skipped`` bad steps within a window (in a short epoch, more than it has steps), or a
spike with ``on_spike: rewind``, ask for a rewind: the weights return to a checkpoint from before,
and the images since then are left out. After ``max_rewinds`` rewinds without a window of good steps
between them, the stage ends with a report.

Everything the guard decides follows from the steps before and is part of the checkpoint. So a
resumed run skips and rewinds as an uninterrupted one does.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from pipeline.config.schema import GuardConfig

_SIGMA = 1.4826  # standard deviation of a normal distribution per median absolute deviation
# A loss that barely moves has a tiny deviation: below this share of the median nothing is a spike.
_LEAST_DEVIATION = 0.02
_CAPTURES = 3  # per stage: each is as large as a checkpoint
_FEW = 5  # bad steps that may come by chance, however short an epoch is
_EXAMPLES = 20  # at most; so many steps must have been applied before one can be called a spike


@dataclass(kw_only=True)
class GuardState:
    """What the guard knows, for a checkpoint.

    ``losses``, ``norms``: of the last applied steps, at most a window. ``bad_steps``: numbers
    (0-based) of the bad steps in the window. ``left_out``: ranges of steps whose images are not
    trained on, as [first, last] in the order of the data. ``rewinds``: without a good window since.
    ``captured``: bad steps (0-based) whose state was kept.
    """

    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    bad_steps: list[int] = field(default_factory=list)
    left_out: list[list[int]] = field(default_factory=list)
    rewinds: int = 0
    captured: list[int] = field(default_factory=list)

    @property
    def shift(self) -> int:
        """How many steps the data is ahead of the steps that were done."""
        return sum(last + 1 - first for first, last in self.left_out)


class Guard:
    """Judges steps. Every rank comes to the same answers."""

    def __init__(
        self,
        config: GuardConfig,
        device: torch.device,
        *,
        steps_per_epoch: int,
        state: GuardState | None = None,
    ) -> None:
        self.config = config
        self._most_skipped = min(config.max_skipped, max(_FEW, steps_per_epoch))
        self.state = state or GuardState()
        self.reason = ""  # why the present step is bad; '' if it is not
        self.is_spike = False
        self._loss = torch.zeros((), device=device)
        self._micro_batches = 0
        self._present = (math.nan, math.nan)  # loss and gradient norm of the present step

    def begin(self) -> None:
        """Forget the step before (or an attempt at the same one)."""
        self.reason = ""
        self.is_spike = False
        self._loss = torch.zeros_like(self._loss)
        self._micro_batches = 0
        self._present = (math.nan, math.nan)

    def add(self, loss: Tensor) -> None:
        """Add the loss of a micro-batch. Does not wait for the device."""
        # A sum on the device: read once per step, where the engine waits anyway.
        self._loss += loss.detach()
        self._micro_batches += 1

    def refuses(self, norm: float) -> bool:
        """Whether the engine must not apply the present step; collective.

        Called where the engine has just read the norm of all gradients.
        """
        self._present = (self._mean_loss(), norm)
        loss_spike = self._spike("loss", self._present[0], self.state.losses)
        self.reason = loss_spike or self._spike("gradient norm", norm, self.state.norms)
        self.is_spike = bool(self.reason)
        return self.is_spike and self.config.on_spike != "warn"

    def applied(self, step: int) -> None:
        """The step was applied, also if it is a spike under ``on_spike: warn``."""
        # A spike is no example of what is usual.
        if not self.is_spike:
            for values, value in zip(
                (self.state.losses, self.state.norms), self._present, strict=True
            ):
                values.append(value)
                del values[: -self.config.window]
        if step - max(self.state.bad_steps, default=-1) >= self.config.window:
            self.state.rewinds = 0

    def loss_is_finite(self) -> bool:
        """Whether the loss of the present step is finite on all ranks. Collective."""
        return math.isfinite(self._mean_loss())

    def skipped(self, step: int, reason: str) -> None:
        """The step was bad, and no retry could help."""
        self.reason = reason
        bad = [entry for entry in self.state.bad_steps if entry > step - self.config.window]
        self.state.bad_steps = [*bad, step]

    @property
    def must_rewind(self) -> bool:
        """True after too many bad steps, or a spike that shall be rewound."""
        bad = self.state.bad_steps
        spike = self.config.on_spike == "rewind" and self.is_spike
        return bool(bad) and (spike or len(bad) > self._most_skipped)

    @property
    def gives_up(self) -> bool:
        """True if a rewind would be one too many."""
        return self.state.rewinds >= self.config.max_rewinds

    def rewound(self, to: GuardState, from_step: int, to_step: int) -> None:
        """Continue from the guard's state in a checkpoint, without the images since then.

        Example: step 118 is bad, the checkpoint has 100 steps. The images of steps 100 to 118 are
        left out; step 100 trains on those of step 119.
        """
        # The history is that of the checkpoint: the steps since then never were. What was left out
        # before stays left out, and rewinds count on.
        first = to_step + self.state.shift
        last = from_step + self.state.shift
        self.state = GuardState(
            losses=list(to.losses),
            norms=list(to.norms),
            left_out=[*self.state.left_out, [first, last]],
            rewinds=self.state.rewinds + 1,
            captured=self.state.captured,
        )

    def wants_capture(self, step: int) -> bool:
        """Whether to keep the state before this bad step: of the first of a window, a few times."""
        recent = [entry for entry in self.state.captured if entry > step - self.config.window]
        if recent or len(self.state.captured) >= _CAPTURES:
            return False
        self.state.captured = [*self.state.captured, step]
        return True

    def _mean_loss(self) -> float:
        """The mean over micro-batches and ranks. Collective; waits for the device."""
        loss = self._loss / max(self._micro_batches, 1)
        dist.all_reduce(loss)
        return float(loss) / dist.get_world_size()

    def _spike(self, name: str, value: float, usual: Sequence[float]) -> str:
        """A spike in words, or ''."""
        # Median and median deviation: a few spikes among the examples do not move them. With a mean
        # the next spike would soon be usual.
        finite = [entry for entry in usual if math.isfinite(entry)]
        if len(finite) < min(_EXAMPLES, self.config.window):
            return ""
        median = statistics.median(finite)
        spread = _SIGMA * statistics.median(abs(entry - median) for entry in finite)
        deviation = max(spread, _LEAST_DEVIATION * abs(median))
        score = (value - median) / deviation if deviation else 0.0
        if not score > self.config.spike_score:
            return ""
        return f"the {name} {value:.4g} is {value / median:.1f} times the usual {median:.4g}"
