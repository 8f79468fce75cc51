"""Where the time of a run with failures goes: the parts sum to the time on the clock."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import pytest

from pipeline.monitor.events import read_last_events
from tests.e2e.job_runs import finish, processes, start, wait_for

KILLS = 5
JOB = """
name: small
model: {channels: [8, 16, 24, 32], depths: [1, 1, 1, 1], columns: 4}
cluster: {processes: 2, device: cpu, threads: 1}
data: {set: {synthetic: {classes: 3, images_per_class: 40}}}
stages:
  prepare: {}
  pretrain:
    {image_size: 32, epochs: 8, global_batch: 8, precision: fp32, base_lr: 1e-3,
     log_every_steps: 1, checkpoint_every_steps: 5, eval_every_epochs: 4}
"""


def last_step(folder: Path) -> int:
    events = read_last_events(folder / "runs/small/logs/pretrain.jsonl")
    return max((event.step for event in events if event.kind == "step"), default=0)


@pytest.mark.slow
def test_the_parts_of_a_run_with_five_kills_sum_to_its_time(tmp_path: Path) -> None:
    (tmp_path / "small.yaml").write_text(JOB)
    began = time.time()
    process = start(tmp_path / "small.yaml")
    reached = 0
    for _ in range(KILLS):
        # A few steps beyond the next checkpoint, so that every kill loses some.
        reached += 12
        assert wait_for(lambda step=reached: last_step(tmp_path) >= step, process), finish(process)  # type: ignore[misc]
        ranks = processes(process, "ray::Worker")
        os.kill(ranks[-1], signal.SIGKILL)
        reached = last_step(tmp_path)
    code, out = finish(process, 400)
    assert code == 0, out
    run_json = tmp_path / "runs/small/run.json"
    record = json.loads(run_json.read_text())
    # The record's last line is written before the interpreter ends, which takes a busy machine a
    # second or two.
    wall = run_json.stat().st_mtime - began
    seconds = record["seconds"]
    assert record["restarts"] == KILLS
    assert sum(seconds.values()) == pytest.approx(wall, rel=0.01, abs=0.3)
    assert min(seconds[part] for part in ("start", "prepare", "step", "recovery")) > 0
    assert seconds["idle"] < 0.5
    assert f"restarts {KILLS}" in out
    print(f"wall {wall:.1f} s; {seconds}")
