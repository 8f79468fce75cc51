"""The table of the faults of a campaign."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table

from pipeline.chaos.campaign import InjectedFault


def table(events: Sequence[InjectedFault]) -> Table:
    """One line per fault: what was done, after which step, and what it cost."""
    shown = Table(box=None, pad_edge=False)
    for name in ("fault", "after step", "steps lost", "seconds to a new step", "what was done"):
        shown.add_column(name, justify="left" if name in ("fault", "what was done") else "right")
    for event in events:
        shown.add_row(
            event.fault, f"{event.step}", f"{event.lost}", f"{event.seconds:.1f}", event.text
        )
    return shown
