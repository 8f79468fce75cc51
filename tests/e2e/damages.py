"""Damages to a finished run, and the commands that the remedies of its errors name."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from pipeline.checkpoint.manifest import list_checkpoints
from pipeline.layout import CLASSES_JSON, DATASET_JSON, WEIGHTS_JSON, RunDir
from tests.e2e.job_runs import ROOT, finish, start

MOST_REMEDIES = 3  # of one damage, each with its own error


def flip(path: Path, offset: int = -1) -> None:
    """Flip one bit, as a disk does: neither size nor time of the file change."""
    content = bytearray(path.read_bytes())
    content[offset] ^= 1
    status = path.stat()
    path.write_bytes(content)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def shard_of(run: RunDir) -> Path:
    return sorted(run.dataset("images").glob("train-*.parquet"))[0]


def damage_records(run: RunDir) -> None:
    """A byte of every small file that a stage writes."""
    flip(run.dataset("images") / DATASET_JSON, 30)
    flip(run.dataset("images") / CLASSES_JSON, 30)
    flip(run.weights("pretrain").with_name(WEIGHTS_JSON), 30)
    flip(run.export / "model.json", 30)


def damage_inputs(run: RunDir) -> None:
    flip(run.dataset("images") / DATASET_JSON, 30)
    flip(run.weights("pretrain"))


def damage_shards(run: RunDir) -> None:
    """One shard with a flipped bit, another one cut; an index with a flipped bit."""
    first, second = sorted(run.dataset("images").glob("*.parquet"))[:2]
    flip(first, 200)
    second.write_bytes(second.read_bytes()[:-10])
    flip(sorted(run.dataset("images").glob("*.idx*"))[0])


def damage_run_state(run: RunDir) -> None:
    """run.json, and the newest checkpoint, which is needed when the state is lost."""
    run.run_json.write_text(run.run_json.read_text()[:-20])
    newest = list_checkpoints(run.checkpoints("pretrain"))[0][1]
    flip(next(newest.glob("*.safetensors")))


def damage_settings(run: RunDir) -> None:
    run.started_with("pretrain").write_text('{"seed": ')


def damage_checkpoints(run: RunDir) -> None:
    """The weights, and every checkpoint that could write them again."""
    flip(run.weights("pretrain"))
    for _, directory in list_checkpoints(run.checkpoints("pretrain")):
        flip(next(directory.glob("*.safetensors")))


@dataclass(frozen=True)
class Damage:
    """A damage, and arguments of the call that meets it; "" stands for the job's whole call."""

    make: Callable[[RunDir], None]
    call: str = ""

    @property
    def name(self) -> str:
        return self.make.__name__.removeprefix("damage_")


DAMAGES = [
    Damage(damage_records),
    Damage(damage_inputs, "--stage export --force"),
    Damage(damage_shards, "verify"),
    Damage(damage_run_state),
    Damage(damage_settings),
    Damage(damage_checkpoints),
]

# "run the job with --stage prepare", "rerun it with --stage pretrain --force", "`rm path`",
# "... run RUN/run.yaml --run-dir RUN --stage prepare"
_FLAGS = re.compile(r"(?:with|--run-dir \S+) ((?:--stage \w+ ?)+(?:--force)?)")
_QUOTED = re.compile(r"`([^`]+)`")


def call(job: Path, arguments: str) -> tuple[int, str]:
    """Exit code and output of a call; of `verify`, if that is the argument."""
    if arguments == "verify":
        command = [sys.executable, "-m", "pipeline", "verify", str(job.parent / "runs" / job.stem)]
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, check=False, timeout=240
        )
        return done.returncode, done.stdout + done.stderr
    return finish(start(job, *arguments.split()))


def apply_remedy(job: Path, error: str) -> None:
    """Run the command that the last remedy in ``error`` names."""
    remedy = error[error.rindex("  -> ") :]
    quoted = _QUOTED.search(remedy)
    if quoted is not None:
        subprocess.run(shlex.split(quoted[1]), check=True)
        return
    flags = _FLAGS.search(remedy)
    assert flags is not None, remedy
    code, out = call(job, flags[1])
    assert code == 0, out
