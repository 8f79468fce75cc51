"""A small job with every stage, run as a user runs it, and its results for comparison."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pipeline.files import file_digest
from pipeline.layout import VERIFICATION
from pipeline.monitor.events import read_events
from tests.prepare.source_folders import class_tars

ROOT = Path(__file__).resolve().parents[2]

JOB = """
name: small
model: {{channels: [8, 16, 24, 32], depths: [1, 1, 2, 1], columns: 4, drop_path: 0.1}}
data: {{root: {root}, min_side: 16, shard_rows: 30, selection_fraction: 0.2}}
stages:
  prepare: {{}}
  pretrain:
    {{image_size: 32, epochs: 4, global_batch: 16, precision: fp32,
     base_lr: 1e-3, base_lr_batch: 16, warmup_epochs: 1,
     log_every_steps: 1, checkpoint_every_steps: 5, eval_every_epochs: 2}}
  finetune:
    {{from: pretrain, image_size: 64, epochs: 2, global_batch: 16, precision: fp32,
     base_lr: 1e-3, base_lr_batch: 16, intermediate_supervision: false, layer_decay: 0.9,
     ema_decay: 0.9, log_every_steps: 1, checkpoint_every_steps: 4,
     keep: best, eval_every_epochs: 0.5,
     augment: {{mixup: 0, cutmix: 0}}}}
  evaluate: {{from: finetune}}
  export: {{from: finetune}}
"""


def make_job(folder: Path) -> Path:
    """A job file and its images in ``folder``: 3 classes, 120 training images, about a
    fifth of which select the weights of fine-tuning, and 33 validation images.
    """
    class_tars(folder / "images", classes=3, count=40, validation=11)
    job = folder / "small.yaml"
    job.write_text(JOB.format(root=folder / "images"))
    return job


def start(job: Path, *arguments: str, umask: int = -1) -> subprocess.Popen[str]:
    """Start ``python -m pipeline`` on a job, in the folder of the job. ``umask`` -1: inherited."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "DS_BUILD_OPS": "0"}
    command = [sys.executable, "-m", "pipeline", str(job), *arguments]
    return subprocess.Popen(
        command,
        cwd=job.parent,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        umask=umask,
    )


_KEEPERS: dict[int, int] = {}  # by the process ID of the driver, which may have ended


def processes(process: subprocess.Popen[str], pattern: str) -> list[int]:
    """Process IDs of a run whose command lines match: those of the driver's session and of Ray's.

    To find Ray's after the driver's end, call this once before.
    """
    keeper = _pgrep("-P", str(process.pid), "-f", "ray_keeper")
    if keeper:
        _KEEPERS[process.pid] = keeper[0]
    sessions = [process.pid, *([_KEEPERS[process.pid]] if process.pid in _KEEPERS else [])]
    return _pgrep("-s", ",".join(map(str, sessions)), "-f", pattern)


def _pgrep(*arguments: str) -> list[int]:
    listed = subprocess.run(["pgrep", *arguments], capture_output=True, text=True, check=False)
    return [int(pid) for pid in listed.stdout.split()]


def finish(process: subprocess.Popen[str], seconds: float = 240) -> tuple[int, str]:
    """Wait for the end; returns (exit code, output)."""
    try:
        out, _ = process.communicate(timeout=seconds)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    return process.returncode, out


def run(job: Path, *arguments: str, umask: int = -1) -> str:
    """Run a job that must succeed; returns its output."""
    code, out = finish(start(job, *arguments, umask=umask))
    assert code == 0, out
    return out


def record(job: Path) -> dict[str, Any]:
    path = job.parent / "runs" / "small" / "run.json"
    result: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"stages": {}}
    return result


def state(job: Path, stage: str) -> str:
    return str(record(job)["stages"].get(stage, {}).get("state", ""))


def wait_for(
    condition: Callable[[], bool], process: subprocess.Popen[str], seconds: float = 120
) -> bool:
    """True once the condition is, False if it is not when the process or the time ends."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and process.poll() is None:
        if condition():
            return True
        time.sleep(0.02)
    return condition()


def losses(run_dir: Path, stage: str) -> dict[int, float]:
    events = read_events(run_dir / "logs" / f"{stage}.jsonl")
    return {event.step: event.scalars["loss/total"] for event in events if event.kind == "step"}


def results(run_dir: Path) -> dict[str, str]:
    """Digests of every result file that has no times: prepared data, weights and export."""
    files = [
        *run_dir.glob("stages/prepare/images/*"),
        *run_dir.glob("stages/*/weights.safetensors"),
        *run_dir.glob("export/*"),
    ]
    return {
        str(path.relative_to(run_dir)): file_digest(path)
        for path in sorted(files)
        # When the images were written; how fast the formats were.
        if path.is_file() and path.name not in ("source.times", VERIFICATION)
    }


def metrics(run_dir: Path) -> dict[str, dict[str, float]]:
    """Metrics of each stage, except those that depend on the clock."""
    stages = json.loads((run_dir / "run.json").read_text())["stages"]
    timed = {"images_per_s", "data_wait_share", "seconds"}
    return {
        name: {key: value for key, value in stage["metrics"].items() if key not in timed}
        for name, stage in stages.items()
    }
