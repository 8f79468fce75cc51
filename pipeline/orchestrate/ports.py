"""Ports of this machine."""

from __future__ import annotations

import socket


def free_port(address: str = "", preferred: int = 0) -> int:
    """A port that is free now on an address of this machine, or on all of them.

    Raises:
        OSError: the preferred one is taken.
    """
    with socket.socket() as probe:
        probe.bind((address, preferred))
        port: int = probe.getsockname()[1]
        return port
