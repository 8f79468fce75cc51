"""Names ranks that take longer than the others for what a rank does alone.

Compared are data and forward pass: in the rest of a step the ranks wait for each other. (Under
ZeRO 3 they also do in the forward pass.)
"""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Mapping, Sequence

import torch
import torch.distributed as dist

from pipeline.monitor import tags
from pipeline.reporting import Log
from pipeline.train.step_times import DATA, FORWARD

# A rank is named after so many slow logs in a row, and so many seconds: less may be chance.
_LOGS = 3
_SLOW_S = 20.0
_LEAST_S = 0.01  # per interval; below, nobody waits for anybody


class Stragglers:
    """Compares the ranks at every log. Collective: all ranks make the same calls.

    Args:
        factor: times the median of the other ranks, from which on a rank is named.
        log: logs a message for the user.
        clock: seconds that only grow.
    """

    def __init__(
        self, factor: float, log: Log, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._factor = factor
        self._log = log
        self._clock = clock
        self._hosts: list[str] = [""] * dist.get_world_size()
        dist.all_gather_object(self._hosts, socket.gethostname())
        self._slow = [0] * dist.get_world_size()  # logs in a row
        self._since = [0.0] * dist.get_world_size()  # when the first of them was written
        self._named: set[int] = set()  # while they are slow

    def compare(self, seconds: Mapping[str, float]) -> dict[str, float]:
        """How much longer than the others the slowest rank takes, and which one it is.

        Args:
            seconds: of this rank since the last call, by phase of a step.

        Returns:
            By tag; nothing if there is only one rank.
        """
        if len(self._hosts) == 1:
            return {}
        # On the host: a GPU is not asked, and the collective of the hosts waits for no kernel.
        own = torch.tensor([seconds.get(DATA, 0.0), seconds.get(FORWARD, 0.0)])
        times = [torch.zeros(2) for _ in self._hosts]
        dist.all_gather(times, own)
        data, forward = torch.stack(times).unbind(1)
        alone: list[float] = (data + forward).tolist()
        others = _medians_of_others(alone)
        for rank, (own_s, usual) in enumerate(zip(alone, others, strict=True)):
            if own_s > self._factor * usual and own_s - usual > _LEAST_S:
                self._count(
                    rank,
                    f"rank {rank} on {self._hosts[rank]} is slow: {own_s / max(usual, 1e-9):.1f} "
                    f"times the others ({float(data[rank]):.2f} s for data, "
                    f"{float(forward[rank]):.2f} s for the forward pass since the last log)",
                )
            else:
                self._slow[rank] = 0
                self._named.discard(rank)
        slowest = alone.index(max(alone))
        return {
            tags.RANK_SPREAD: alone[slowest] / max(others[slowest], 1e-9) - 1,
            tags.SLOWEST_RANK: float(slowest),
        }

    def _count(self, rank: int, text: str) -> None:
        """Count a slow log of a rank, and log the text once the rank has been slow for a while."""
        now = self._clock()
        if self._slow[rank] == 0:
            self._since[rank] = now
        self._slow[rank] += 1
        lasts = self._slow[rank] >= _LOGS and now - self._since[rank] >= _SLOW_S
        if lasts and rank not in self._named:
            self._named.add(rank)
            self._log(text, "warning")


def _medians_of_others(values: Sequence[float]) -> list[float]:
    """For each of at least two values, the median of all the others. Sorts once.

    Example: 1, 5, 3, 9 -> 5, 3, 5, 3. Without 1, the others in order are 3, 5, 9.
    """
    order = sorted(range(len(values)), key=lambda index: values[index])
    number = len(values) - 1
    medians = [0.0] * len(values)
    for place, index in enumerate(order):
        # What stands behind the value that is left out moves up by one place.
        low, high = (
            values[order[middle + (middle >= place)]] for middle in ((number - 1) // 2, number // 2)
        )
        medians[index] = (low + high) / 2
    return medians
