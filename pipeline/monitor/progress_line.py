"""The live line of a stage: label, bar, count, time left, then as many metrics as fit.

    pretrain ━━━━━━━━━━━━━━━━ 11/28  0:00:05 left  epoch 2  loss 6.4539  top-1 42.4%
    pretrain ━━━━━━━━ 11/28  0:00:05 left  epoch 2  loss 6.4539
    pretrain ⠋ compiling  0:01:12

Which part gives way on a narrow terminal is decided here: first the metrics, the last one first,
then the end of the label. The bar, the count and the time left always stay.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta

from rich.console import Console, ConsoleOptions, RenderResult
from rich.progress_bar import ProgressBar
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

SHORTEST_BAR = 8
LONGEST_BAR = 40
_GAP = "  "
_LEFT_WIDTH = len("0:00:00 left")  # kept free from the start, so that the bar does not jump


@dataclass(frozen=True, kw_only=True)
class ProgressLine:
    """Work of which ``done`` of ``total`` units are finished.

    ``left``: the time left in words, or ''. ``details``: texts, the most important one first.
    """

    label: str
    done: int
    total: int
    left: str = ""
    details: tuple[str, ...] = ()

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        # One column is left free: some terminals wrap a line that fills their width.
        label, bar, rest = self.parts(options.max_width - 1)
        grid = Table.grid(padding=(0, 1, 0, 0))
        for width in (len(label), bar, len(rest)):
            grid.add_column(width=width, no_wrap=True)
        grid.add_row(
            Text(label, "bold"),
            ProgressBar(total=max(self.total, 1), completed=self.done, width=bar),
            Text(rest, "cyan"),
        )
        yield grid

    def parts(self, width: int) -> tuple[str, int, str]:
        """The label, the length of the bar and the text after it, for a line of ``width``.

        Example, 59 columns: "pretrain" (8), "11/28  0:00:05 left" (19), the shortest bar (8) and
        two spaces leave 22: "  epoch 2" (9) and "  loss 6.4539" (13) fit, "  top-1 42.4%" does not.
        """
        total = f"{self.total:,}"
        rest = f"{self.done:>{len(total)},}/{total}{_GAP}{self.left:<{_LEFT_WIDTH}}"
        room = width - len(rest) - SHORTEST_BAR - 2  # for the label and the details
        label = self.label
        if len(label) > room:
            label = f"{label[: max(room - 1, 0)]}…"
        room -= len(label)
        for detail in self.details:
            if len(_GAP) + len(detail) > room:
                break
            rest += _GAP + detail
            room -= len(_GAP) + len(detail)
        return label, min(SHORTEST_BAR + max(room, 0), LONGEST_BAR), rest


class PhaseLine:
    """A word for what happens before anything can be counted, and for how long it has lasted."""

    def __init__(self, label: str, word: str, clock: Callable[[], float]) -> None:
        self._label = label
        self._word = word
        self._clock = clock
        self._since = clock()
        self._spinner = Spinner("dots")

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        elapsed = timedelta(seconds=int(self._clock() - self._since))
        self._spinner.update(text=Text(f"{self._word}{_GAP}{elapsed}", "cyan"))
        grid = Table.grid(padding=(0, 1, 0, 0))
        grid.add_row(Text(self._label, "bold", no_wrap=True), self._spinner)
        yield grid
