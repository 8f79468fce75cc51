"""Work that falls into independent pieces, as Ray tasks: a bounded number in flight, lost workers' pieces done again."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

from pipeline.errors import PipelineError, StageError

RETRIES = 5  # of a piece whose worker died
FLIGHT = 2  # pieces under way for each core: the next one waits where it will run

Item = TypeVar("Item")
Result = TypeVar("Result")


def map_tasks(
    function: Callable[[Item], Result], items: Sequence[Item]
) -> Iterator[tuple[Item, Result]]:
    """Apply ``function`` to every item in the running Ray session; yields (item, result) as they are done.

    Raises:
        PipelineError: the one that a piece raised; StageError for any other failure, and for a worker that keeps dying.
    """
    import ray

    # The function travels with each piece: of an object of its own in the store, Ray would end this process at the loss of
    # the node, without a word.
    remote: Any = ray.remote(num_cpus=1, max_retries=RETRIES)(_apply)
    most = FLIGHT * max(1, int(ray.cluster_resources().get("CPU", 1)))
    waiting = iter(items)
    flying: dict[Any, Item] = {}
    try:
        while True:
            while len(flying) < most and (item := next(waiting, None)) is not None:
                flying[remote.remote(function, item)] = item
            if not flying:
                return
            ready, _ = ray.wait(list(flying), timeout=0.5)
            for ref in ready:
                yield flying.pop(ref), _result(ref)
    finally:
        for ref in flying:
            ray.cancel(ref, force=True)


def _apply(function: Callable[[Item], Result], item: Item) -> Result:
    return function(item)


def _result(ref: Any) -> Any:
    import ray

    try:
        return ray.get(ref)
    except ray.exceptions.RayTaskError as error:
        raise _for_the_user(error.cause, str(error)) from None
    except ray.exceptions.RayError as error:
        remedy = "free memory, or lower the number of workers; the same command goes on from here"
        cause = f"a piece of work is lost: its worker died {RETRIES + 1} times, or Ray's node did: {error}"
        raise StageError(cause, remedy=remedy) from None


def _for_the_user(cause: BaseException, text: str) -> PipelineError:
    if isinstance(cause, PipelineError):
        return cause
    if isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT):
        remedy = "free some space; the same command goes on from here"
        return StageError("the disk is full", place=str(cause.filename or ""), remedy=remedy)
    return StageError(text)
