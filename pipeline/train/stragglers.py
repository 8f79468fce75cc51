"""Names ranks that take longer than the others for what a rank does alone.

Compared are data and forward pass: in the rest of a step the ranks wait for each other. (Under
ZeRO 3 they also do in the forward pass.)
"""

from __future__ import annotations

import socket
import statistics
from collections.abc import Mapping

import torch
import torch.distributed as dist

from pipeline.monitor import tags
from pipeline.reporting import Log
from pipeline.train.step_times import DATA, FORWARD

_LOGS = 3  # in a row, before a rank is named: one slow interval may be chance
_LEAST_S = 0.01  # per interval; below, nobody waits for anybody


class Stragglers:
    """Compares the ranks at every log. Collective: all ranks make the same calls.

    Args:
        factor: times the median of the other ranks, from which on a rank is named.
        log: logs a message for the user.
    """

    def __init__(self, factor: float, log: Log) -> None:
        self._factor = factor
        self._log = log
        self._hosts: list[str] = [""] * dist.get_world_size()
        dist.all_gather_object(self._hosts, socket.gethostname())
        self._slow = [0] * dist.get_world_size()  # logs in a row

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
        others = [statistics.median(alone[:rank] + alone[rank + 1 :]) for rank in range(len(alone))]
        for rank, (time, usual) in enumerate(zip(alone, others, strict=True)):
            is_slow = time > self._factor * usual and time - usual > _LEAST_S
            self._slow[rank] = self._slow[rank] + 1 if is_slow else 0
            if self._slow[rank] == _LOGS:
                self._log(
                    f"rank {rank} on {self._hosts[rank]} is slow: {time / max(usual, 1e-9):.1f} "
                    f"times the others ({float(data[rank]):.2f} s for data, "
                    f"{float(forward[rank]):.2f} s for the forward pass since the last log)",
                    "warning",
                )
        slowest = alone.index(max(alone))
        return {
            tags.RANK_SPREAD: alone[slowest] / max(others[slowest], 1e-9) - 1,
            tags.SLOWEST_RANK: float(slowest),
        }
