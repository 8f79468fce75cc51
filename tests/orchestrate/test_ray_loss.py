"""A process that is stuck in a call to a lost Ray ends with the error of the loss."""

from __future__ import annotations

import subprocess
import sys

PROGRAM = """
import threading
from pipeline.orchestrate import ray_loss
from pipeline.orchestrate.ray_loss import RayLost, loss_watched

ray_loss._STUCK_S, ray_loss._POLL_S = {seconds}, 0.05
def check():
    raise RayLost("Ray's node process (raylet) was killed", remedy="rerun")
with loss_watched(lambda: True, check):
    threading.Event().wait({stuck})
print("not stuck")
"""


def run(*, seconds: float, stuck: float) -> subprocess.CompletedProcess[str]:
    program = PROGRAM.format(seconds=seconds, stuck=stuck)
    command = [sys.executable, "-c", program]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def test_the_loss_is_named_and_is_the_exit_code() -> None:
    done = run(seconds=0.2, stuck=50)
    assert done.returncode == 3
    assert "error: Ray's node process (raylet) was killed\n  -> rerun" in done.stderr


def test_a_main_thread_that_gets_on_is_left_alone() -> None:
    done = run(seconds=20, stuck=0.3)
    assert done.returncode == 0
    assert done.stdout == "not stuck\n"
