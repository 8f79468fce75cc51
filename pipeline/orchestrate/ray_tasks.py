"""Runs independent pieces of work as Ray tasks: a bounded number at a time, with retries."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from pipeline.errors import StageError
from pipeline.orchestrate.user_errors import RERUN, user_error

if TYPE_CHECKING:
    from ray import ObjectRef

RETRIES = 5  # of a task whose worker died
TASKS_PER_CORE = 2  # submitted at a time, so that a worker finds its next task waiting

Item = TypeVar("Item")
Result = TypeVar("Result")


def map_tasks(
    function: Callable[[Item], Result], items: Sequence[Item], check: Callable[[], None]
) -> Iterator[tuple[Item, Result]]:
    """Apply ``function`` to every item in the running Ray session.

    ``check`` is called several times per second and may raise: the session's own check.

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
    limit = TASKS_PER_CORE * max(1, int(ray.cluster_resources().get("CPU", 1)))
    waiting = iter(items)
    submitted: dict[ObjectRef[Result], Item] = {}
    try:
        while True:
            while len(submitted) < limit and (item := next(waiting, None)) is not None:
                submitted[task.remote(function, item)] = item
            if not submitted:
                return
            # Short waits, so that a stop request is noticed soon.
            ready, _ = ray.wait(list(submitted), timeout=0.5)
            check()
            for ref in ready:
                yield submitted.pop(ref), _result(ref)
    finally:
        # Reached with tasks left after an error, a stop request, or a consumer that stopped early.
        for ref in submitted:
            ray.cancel(ref, force=True)


def _apply(function: Callable[[Item], Result], item: Item) -> Result:
    return function(item)


def _result(ref: ObjectRef[Result]) -> Result:
    import ray

    try:
        return ray.get(ref)
    except ray.exceptions.RayTaskError as error:
        raise user_error(error.cause) or StageError(str(error)) from None
    except ray.exceptions.RayError as error:
        raise StageError(
            f"the worker of a task died {RETRIES + 1} times: {error}",
            remedy=f"free memory or lower the number of workers, then {RERUN}",
        ) from None
