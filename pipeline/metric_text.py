"""Writes a metric in words, the same way in the terminal, the log and every table.

Examples: top1 = 0.7621 is "top-1 76.2%", loss/validation = 1.25 is "validation loss 1.2500", and
images_per_s = 1234.5 is "1,234.5 images/s".
"""

from __future__ import annotations

import re

RATE = "images_per_s"
_LABELS = {"loss/total": "loss", "loss/validation": "validation loss"}
_TOP = re.compile(r"top(\d+)$")  # at the end: a split may stand before it, as in "train_top1"


def metric_text(name: str, value: float) -> str:
    """One metric with its label. ``name``: as in run.json, or its tag in the event log."""
    name = name.rpartition("/")[2] if name.startswith(("accuracy/", "throughput/")) else name
    if name == RATE:
        return f"{value:,.1f} images/s"
    label = _TOP.sub(r"top-\1", _LABELS.get(name, name)).replace("_", " ")
    if _TOP.search(name) or name.endswith("accuracy"):
        return f"{label} {value:.1%}"
    if "loss" in name:
        return f"{label} {value:.4f}"
    # Counts are whole numbers; anything else gets four significant digits.
    return f"{label} {value:,.0f}" if value == int(value) else f"{label} {value:,.4g}"
