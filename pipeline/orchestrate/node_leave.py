"""Tells a Ray cluster that a machine leaves. A program of its own, run by ``node``.

    node_leave.py drain GCS NODE_ID GRACE     marks the machine as leaving, and ends
    node_leave.py drivers GCS NODE_ID GRACE   sends SIGTERM to the drivers on the machine of the
                                              head, and ends when none is left

Ray's client ends its process if anything is wrong. That must not be the process that has to clean
up; and whatever this one waits for, that one ends it when the grace is over.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from typing import Any, Protocol

_POLL_S = 0.1


class _HeadClient(Protocol):
    """The two calls of Ray's GcsClient that are used here."""

    def drain_node(self, node_id: str, reason: int, text: str, deadline_ms: int) -> object: ...

    def get_all_job_info(self) -> dict[Any, Any]: ...


def main(action: str, gcs: str, node_id: str, grace: float) -> None:
    """Connect with the head at ``gcs``, and do it."""
    from ray._raylet import GcsClient  # type: ignore[attr-defined]

    client: _HeadClient = GcsClient(address=gcs)
    if action == "drain":
        _drain(client, node_id, grace)
    else:
        _end_drivers(client, node_id)


def _drain(client: _HeadClient, node_id: str, grace: float) -> None:
    """The driver sees the machine leave; its raylet ends when no process needs it."""
    from ray.core.generated import autoscaler_pb2

    client.drain_node(
        node_id,
        autoscaler_pb2.DRAIN_NODE_REASON_PREEMPTION,  # type: ignore[attr-defined]
        "stop signal",
        int((time.time() + grace) * 1000),
    )


def _end_drivers(client: _HeadClient, node_id: str) -> None:
    asked: set[int] = set()
    while drivers := _drivers(client, node_id):
        for pid in drivers - asked:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGTERM)
        asked |= drivers
        time.sleep(_POLL_S)


def _drivers(client: _HeadClient, node_id: str) -> set[int]:
    """Process IDs of the drivers on a machine that have not ended; Ray's own are left out."""
    return {
        job.driver_pid
        for job in client.get_all_job_info().values()
        if not job.is_dead
        and job.driver_address.node_id.hex() == node_id
        and not job.config.ray_namespace.startswith("_ray_internal")
    }


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3], float(sys.argv[4]))
