"""One file of a source, as a reader hands it to preparation."""

from __future__ import annotations

from dataclasses import dataclass

MAX_BYTES = 256 << 20  # per file, unpacked
# Reason of a file that was never meant to be an image: listed, and not counted as rejected.
LEFT_OUT = "left_out"


@dataclass(frozen=True)
class Rejection:
    """Why a file is not a usable image.

    ``reason``: one of a few words, for counting; ``detail``: the exact finding. ``size``: width and
    height in pixels, (0, 0) if unknown.
    """

    reason: str
    detail: str = ""
    size: tuple[int, int] = (0, 0)


@dataclass(frozen=True, kw_only=True)
class Member:
    """One file of a source: key (unique in the dataset), class index, and bytes or a rejection.

    A truncated file has both: its bytes go to the quarantine.
    """

    key: str
    label: int
    data: bytes = b""
    rejection: Rejection | None = None
