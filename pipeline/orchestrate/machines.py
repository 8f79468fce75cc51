"""The machines of a Ray cluster, and calls of a function on each of them."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

Result = TypeVar("Result")

ID_LABEL = "ray.io/node-id"  # Ray's own label: selects machines for tasks and groups
_POLL_S = 0.1


@dataclass(frozen=True, kw_only=True)
class Machine:
    """A machine of the cluster.

    ``id``: Ray's, hexadecimal; a machine that returns has a new one. ``address``: its IP, as the
    other machines reach it.
    """

    id: str
    address: str
    host: str
    cpus: float
    gpus: float

    @property
    def name(self) -> str:
        """For messages: "gpu-17 (10.0.0.17)"."""
        return f"{self.host} ({self.address})"


def alive_machines() -> list[Machine]:
    """The machines that Ray believes to be alive, in the order of their addresses."""
    import ray

    machines = [
        Machine(
            id=entry["NodeID"],
            address=entry["NodeManagerAddress"],
            host=entry["NodeManagerHostname"],
            cpus=entry["Resources"].get("CPU", 0.0),
            gpus=entry["Resources"].get("GPU", 0.0),
        )
        for entry in ray.nodes()
        if entry["Alive"]
    ]
    return sorted(
        machines, key=lambda machine: [part.zfill(3) for part in machine.address.split(".")]
    )


def leaving_machines() -> set[str]:
    """IDs of the machines that are being drained: preempted, or taken away by an administrator."""
    import ray

    # No public function tells it (2.60); tests/cluster would fail if this one changed.
    return set(ray._private.state.state.get_draining_nodes())


def call_on_each(
    machines: Sequence[Machine],
    function: Callable[..., Result],
    *arguments: Any,
    timeout_s: float,
    check: Callable[[], None],
    gpus: float = 0,
) -> dict[Machine, Result | Exception | None]:
    """Call a function in a process on each machine, on all at once.

    Args:
        check: called several times per second; may raise.
        gpus: that the function needs; it waits until they are free.

    Returns:
        by machine what the function returned, the error that it raised or that its machine caused,
        or None if there was no answer within ``timeout_s``.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    task = ray.remote(function)
    calls = {
        task.options(
            num_cpus=0,
            num_gpus=gpus,
            max_retries=0,
            scheduling_strategy=NodeAffinitySchedulingStrategy(machine.id, soft=False),
        ).remote(*arguments): machine
        for machine in machines
    }
    waiting = list(calls)
    deadline = time.monotonic() + timeout_s
    while waiting and time.monotonic() < deadline:
        _, waiting = ray.wait(waiting, num_returns=len(waiting), timeout=_POLL_S)
        check()
    answers: dict[Machine, Result | Exception | None] = {}
    for call, machine in calls.items():
        if call in waiting:
            ray.cancel(call, force=True)
            answers[machine] = None
            continue
        try:
            answers[machine] = ray.get(call)
        except ray.exceptions.RayTaskError as error:
            answers[machine] = error.cause
        except ray.exceptions.RayError as error:
            answers[machine] = error
    return answers
