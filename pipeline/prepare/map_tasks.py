"""How preparation hands pieces of work to workers, whoever they are."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Protocol, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


class MapTasks(Protocol):
    """Applies a function to items on the available workers.

    Yields (item, result) in the order of completion.
    """

    def __call__(
        self, function: Callable[[Item], Result], items: Sequence[Item]
    ) -> Iterator[tuple[Item, Result]]: ...
