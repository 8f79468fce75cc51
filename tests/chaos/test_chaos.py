"""The command chaos makes faults, counts them, and reports results that differ."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipeline.chaos.campaign import Campaign
from pipeline.chaos.faults import flip_a_bit
from pipeline.chaos.local_driver import LocalDriver
from pipeline.chaos.local_faults import local_faults
from pipeline.chaos.own_disk import own_disk
from pipeline.errors import ConfigError, Interrupted, StageError
from pipeline.layout import RunDir
from tests.cluster.processes import all_pids, command_line
from tests.e2e.job_runs import ROOT, make_job

pytestmark = pytest.mark.slow


def start(job: Path, *arguments: str) -> subprocess.Popen[str]:
    """Start the command on a job, in the folder of the job."""
    return subprocess.Popen(
        [sys.executable, "-m", "pipeline", "chaos", str(job), *arguments],
        cwd=job.parent,
        env=os.environ | {"PYTHONPATH": str(ROOT), "DS_BUILD_OPS": "0"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_a_job_survives_four_faults_with_equal_results(tmp_path: Path) -> None:
    process = start(make_job(tmp_path), "--faults", "4", "--seed", "1")
    output, errors = process.communicate(timeout=1200)
    assert process.returncode == 0, output + errors
    assert "all results are equal; faults: 4" in output
    folder = tmp_path / "runs" / "small-chaos-1"
    result = json.loads((folder / "chaos.json").read_text())
    assert len(result["faults"]) == 4
    assert result["different"] == []
    # Each waited for a new step after the one before.
    steps = [fault["step"] + fault["lost"] for fault in result["faults"]]
    assert steps == sorted(steps)
    assert not [line for line in errors.splitlines() if "Traceback" in line]


def test_chaos_that_is_stopped_leaves_nothing_behind(tmp_path: Path) -> None:
    process = start(make_job(tmp_path), "--seed", "1")
    folder = tmp_path / "runs" / "small-chaos-1"
    events = RunDir(folder / "disturbed" / "run").events("pretrain")
    for _ in range(600):
        if events.exists() or process.poll() is not None:
            break
        time.sleep(0.2)
    process.terminate()
    output, errors = process.communicate(timeout=120)
    assert process.returncode == Interrupted.exit_code, output + errors
    assert not [pid for pid in all_pids() if str(folder) in command_line(pid)]
    assert str(folder) not in Path("/proc/self/mounts").read_text()


def campaign(folder: Path, job: Path, **settings: object) -> Campaign:
    values = {"faults": 1, "seed": 0, "log": lambda text, level="info": None} | settings
    return Campaign(arguments=[str(job)], stages=["pretrain"], folder=folder, **values)  # type: ignore[arg-type]


def local_driver(folder: Path) -> LocalDriver:
    return LocalDriver(
        arguments=["no-such-job"], run_dir=RunDir(folder), stages=[], log=folder / "log"
    )


def test_results_that_differ_are_named(tmp_path: Path) -> None:
    runs = [RunDir(tmp_path / name) for name in ("one", "other")]
    for run in runs:
        run.weights("pretrain").parent.mkdir(parents=True)
        run.weights("pretrain").write_bytes(b"weights of a stage")
        run.export.mkdir()
        (run.export / "model.safetensors").write_bytes(b"weights of an export")
    compared = campaign(tmp_path, tmp_path / "job.yaml")
    assert compared._differences(*runs) == []
    flip_a_bit(runs[1].weights("pretrain"), random.Random(0))
    (runs[0].export / "model.safetensors").unlink()
    assert compared._differences(*runs) == [
        "export/model.safetensors",
        "stages/pretrain/weights.safetensors",
    ]


def test_a_job_that_fails_by_itself_is_not_disturbed(tmp_path: Path) -> None:
    job = tmp_path / "job.yaml"
    job.write_text("name: a\nmodel: nothing\n")
    (tmp_path / "chaos").mkdir()
    with pytest.raises(StageError, match="the undisturbed run failed"):
        campaign(tmp_path / "chaos", job).run()


def test_a_run_heeds_signals_that_chaos_ignores(tmp_path: Path) -> None:
    driver = local_driver(tmp_path)
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as under nohup
    try:
        driver.start()
    finally:
        signal.signal(signal.SIGHUP, before)
    driver.send(signal.SIGHUP)
    assert driver.wait(60) == -signal.SIGHUP


def test_one_bit_is_flipped_and_neither_size_nor_time_shows_it(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(100))
    before = path.stat()
    flip_a_bit(path, random.Random(3))
    after = path.stat()
    assert (after.st_size, after.st_mtime_ns) == (before.st_size, before.st_mtime_ns)
    assert sum(byte.bit_count() for byte in path.read_bytes()) == 1


def test_only_a_disk_of_its_own_is_filled(tmp_path: Path) -> None:
    driver = local_driver(tmp_path)
    names = [{fault.name for fault in local_faults(driver, has_disk=has)} for has in (True, False)]
    assert names[0] - names[1] == {"full disk"}
    with own_disk(tmp_path / "disk", 1 << 20) as is_mounted:
        mounts = Path("/proc/self/mounts").read_text()
        assert bool(re.search(rf"^none {tmp_path}/disk tmpfs ", mounts, re.MULTILINE)) == is_mounted
    assert f"{tmp_path}/disk" not in Path("/proc/self/mounts").read_text()


@pytest.mark.parametrize(
    ("cluster", "options", "expected"),
    [
        ("kind: slurm", [], "--reach 'ssh {host}'"),
        (
            "kind: slurm\nruns: /nowhere/runs",
            ["--reach", "ssh {host}"],
            "/nowhere/runs: chaos",
        ),
        ("kind: local", ["--reach", "ssh {host}"], "only on a cluster"),
    ],
)
def test_a_cluster_out_of_reach_is_refused(
    tmp_path: Path, cluster: str, options: list[str], expected: str
) -> None:
    job = make_job(tmp_path)
    (tmp_path / "cluster.yaml").write_text(f"{cluster}\ndevice: cpu\n")
    process = start(job, "--on", "cluster.yaml", *options)
    output, errors = process.communicate(timeout=120)
    assert process.returncode == ConfigError.exit_code, output + errors
    assert expected in output + errors
    assert not (tmp_path / "runs").exists()


def test_the_command_is_documented() -> None:
    assert "./launch.sh chaos" in (ROOT / "README.md").read_text()
