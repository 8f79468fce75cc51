"""Runs independent pieces of work as Ray tasks: a bounded number at a time, with retries."""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from pipeline.errors import PipelineError, StageError
from pipeline.orchestrate.machines import alive_machines
from pipeline.orchestrate.user_errors import RERUN, user_error

if TYPE_CHECKING:
    from ray import ObjectRef

RETRIES = 5  # of a task whose worker died
TASKS_PER_CORE = 2  # submitted at a time, so that a worker finds its next task waiting
_COUNT_S = 2.0  # between counts of the cores of a cluster, whose machines come and go
_LONGEST_ITEM = 120  # characters of an item in an error

Item = TypeVar("Item")
Result = TypeVar("Result")


def map_tasks(
    function: Callable[[Item], Result],
    items: Sequence[Item],
    check: Callable[[], None],
    *,
    options: Mapping[str, object] | None = None,
    shares: Counter[str] | None = None,
) -> Iterator[tuple[Item, Result]]:
    """Apply ``function`` to every item in the running Ray session.

    Args:
        check: called several times per second; may raise: the session's own check.
        options: further ones of the tasks.
        shares: counts the tasks by the address of the machine that ran them; for a cluster. Errors
            then name the machine.

    Yields (item, result) in the order in which the tasks finish. When a worker dies, Ray runs its
    task again, up to ``RETRIES`` times.

    Raises:
        PipelineError: the one that a task raised; a StageError for any other exception, and for a
            task whose worker died every time.
    """
    import ray

    # Send the function with each task. As an object of its own in Ray's store it would be lost with
    # its node, upon which Ray ends the driver without a message.
    task: Any = ray.remote(num_cpus=1, max_retries=RETRIES)(_apply)
    if options:
        task = task.options(**options)
    limit = _TaskLimit(machines_change=shares is not None)
    waiting = iter(items)
    submitted: dict[ObjectRef[tuple[str, Result]], Item] = {}
    try:
        while True:
            while len(submitted) < limit() and (item := next(waiting, None)) is not None:
                submitted[task.remote(function, item)] = item
            if not submitted:
                return
            # Short waits, so that a stop request is noticed soon.
            ready, _ = ray.wait(list(submitted), timeout=0.5)
            check()
            for ref in ready:
                item = submitted.pop(ref)
                address, result = _result(ref, item, on_cluster=shares is not None)
                if shares is not None:
                    shares[address] += 1
                yield item, result
    finally:
        # Reached with tasks left after an error, a stop request, or a consumer that stopped early.
        for ref in submitted:
            ray.cancel(ref, force=True)


def _apply(function: Callable[[Item], Result], item: Item) -> tuple[str, Result]:
    """Run a task; returns the address of its machine, too."""
    import ray

    return ray.util.get_node_ip_address(), function(item)


def _result(
    ref: ObjectRef[tuple[str, Result]], item: object, *, on_cluster: bool
) -> tuple[str, Result]:
    import ray

    try:
        return ray.get(ref)
    except ray.exceptions.RayTaskError as error:
        known = user_error(error.cause)
        if not on_cluster:
            raise known or StageError(str(error)) from None
        raise _with_machine(known or StageError(str(error), place=_name(item)), error) from None
    except ray.exceptions.RayError as error:
        raise StageError(
            f"the worker of a task died {RETRIES + 1} times: {error}",
            place=_name(item),
            remedy=f"free memory or lower the number of workers, then {RERUN}",
        ) from None


class _TaskLimit:
    """How many tasks may be submitted at a time: as many as keep every core of Ray busy."""

    def __init__(self, *, machines_change: bool) -> None:
        self._machines_change = machines_change
        self._limit = 0
        self._counted = 0.0

    def __call__(self) -> int:
        import ray

        is_old = self._machines_change and time.monotonic() - self._counted > _COUNT_S
        if not self._limit or is_old:
            cores = max(1, int(ray.cluster_resources().get("CPU", 1)))
            self._limit = TASKS_PER_CORE * cores
            self._counted = time.monotonic()
        return self._limit


def _name(item: object) -> str:
    """An item in an error: its own name if it has one."""
    return str(getattr(item, "name", item))[:_LONGEST_ITEM]


def _with_machine(error: PipelineError, raised: Exception) -> PipelineError:
    """The error of a task with the machine that it ran on, which Ray's text names by address."""
    address = re.search(r"\bip=([0-9a-f.:]+)", str(raised))
    names = {machine.address: machine.name for machine in alive_machines()}
    if address is None:
        return error
    cause = f"{error.cause} (on {names.get(address[1], address[1])})"
    return type(error)(cause, place=error.place, remedy=error.remedy)
