"""Calls a small function on a machine of the cluster, without the help of the processes there."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

Value = TypeVar("Value")


def call_on_machine(
    node: str | None, function: Callable[..., Value], *arguments: object, timeout_s: float
) -> Value | None:
    """What the function returns; None if the machine does not answer within the time.

    Args:
        node: ID of the machine in Ray; None: this machine.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    if node is None:
        return function(*arguments)
    there = NodeAffinitySchedulingStrategy(node, soft=False)
    task = ray.remote(function).options(num_cpus=0, scheduling_strategy=there, max_retries=0)
    try:
        value: Value = ray.get(task.remote(*arguments), timeout=timeout_s)
    except (ray.exceptions.RayError, ray.exceptions.GetTimeoutError):
        return None
    return value
