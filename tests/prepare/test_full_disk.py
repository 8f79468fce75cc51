"""A full disk during preparation (fault D7) leaves no half-written file; a rerun continues."""

from __future__ import annotations

import os
import re
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.prepare.verify import verify_dataset
from tests.prepare.source_folders import (
    class_tars,
    prepare,
    serial,
    shard_bytes,
)

ROOT = Path(__file__).resolve().parents[2]


def test_a_file_size_limit_leaves_no_half_written_file(tmp_path: Path) -> None:
    """The limit is met in a unit's shard or in a final shard.

    Without it, a rerun gives the same bytes.
    """
    source = class_tars(tmp_path / "in", count=30)
    prepare(source, tmp_path / "uninterrupted", shard_rows=40)
    expected = shard_bytes(tmp_path / "uninterrupted")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    largest = max(len(data) for data in expected.values())
    for limit in (1000, largest // 2, largest - 1):
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
            with pytest.raises(OSError):
                prepare(source, tmp_path / "out", shard_rows=40)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        for path in (tmp_path / "out").glob("train-*.parquet"):
            assert path.read_bytes() == expected[path.name], "a shard with its final name is whole"
        assert not list((tmp_path / "out").rglob(".*.tmp"))
    prepare(source, tmp_path / "out", shard_rows=40)
    assert shard_bytes(tmp_path / "out") == expected


# Runs a job three times on a file system of its own: too small for the files of the run, too small
# for a unit, large enough.
RUNS_ON_A_SMALL_DISK = """
import subprocess, sys
from pathlib import Path
job, disk, out = sys.argv[1], Path(sys.argv[2]), sys.argv[3]
disk.mkdir()
command = [sys.executable, "-m", "pipeline", job, "--run-dir", str(disk / "run")]
for size in ("8k", "2m", "200m"):
    if (disk / "run").exists():
        options = ["-o", f"remount,size={size}"]
    else:
        options = ["-t", "tmpfs", "-o", f"size={size}", "none"]
    subprocess.run(["mount", *options, str(disk)], check=True)
    run = subprocess.run(command, capture_output=True, text=True)
    print(run.returncode, run.stdout + run.stderr, sep="\\n", end="\\n=====\\n")
subprocess.run(["cp", "-r", str(disk / "run/stages/prepare/images"), out], check=True)
"""
JOB = """
name: small
model: {{channels: [8, 16, 24, 32], depths: [1, 1, 2, 1], columns: 4}}
data: {{root: {root}, min_side: 16, shard_rows: 400}}
stages: {{prepare: {{}}}}
"""


def can_mount() -> bool:
    if shutil.which("unshare") is None:
        return False
    return subprocess.run(["unshare", "-rm", "true"], check=False).returncode == 0


@pytest.mark.slow
def test_a_full_disk_stops_with_a_remedy_and_a_rerun_completes(tmp_path: Path) -> None:
    if not can_mount():
        pytest.skip("file systems cannot be mounted here")
    source = class_tars(tmp_path / "in", classes=4, count=300)
    prepare(source, tmp_path / "uninterrupted", shard_rows=400)
    (tmp_path / "small.yaml").write_text(JOB.format(root=source))
    paths = [str(tmp_path / name) for name in ("small.yaml", "disk", "out")]
    process = subprocess.run(
        ["unshare", "-rm", sys.executable, "-c", RUNS_ON_A_SMALL_DISK, *paths],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == 0, process.stdout + process.stderr
    runs = process.stdout.split("\n=====\n")[:-1]
    assert [run.split("\n", 1)[0] for run in runs] == ["3", "3", "0"], process.stdout
    for run in runs[:2]:
        assert "the disk is full" in run
        assert re.search(r"-> free some space.*the same command", run)
    assert "Traceback" not in process.stdout
    expected = shard_bytes(tmp_path / "uninterrupted")
    assert shard_bytes(tmp_path / "out").keys() == expected.keys()
    for name, data in expected.items():
        if name.endswith((".parquet", ".idx")):
            assert (tmp_path / "out" / name).stat().st_size == len(data)
    assert verify_dataset(tmp_path / "out", serial, lambda *_: None) == []
