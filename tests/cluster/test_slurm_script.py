"""The batch script and the answers of Slurm, as text."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest

from pipeline.cluster.launcher import Submission
from pipeline.cluster.slurm import parse_state
from pipeline.cluster.slurm_script import render
from pipeline.config.schema import ClusterConfig

HOSTILE = "a'b\"c; touch x $(touch x) `touch x` \\ #k %j é"
PENDING = (
    "JobId=7 JobName={name} UserId=me(1) Priority=1 JobState=PENDING Reason=Resources "
    "Restarts=2 ExitCode=0:0 RunTime=00:00:00 TimeLimit=01:00:00 StartTime=2026-01-31T12:00:00 "
    "EndTime=Unknown Comment=JobState=RUNNING "
)


def rendered(name: str = "small", run_dir: str = "/shared/runs/a", **keys: Any) -> str:
    cluster = ClusterConfig.model_validate(
        {"kind": "slurm", "nodes": 2, "devices_per_node": 8, "device": "cuda", **keys}
    )
    return render(
        Submission(
            name=name,
            cluster=cluster,
            run_dir=Path(run_dir),
            job_text=f"name: {name!r}\n",
            options=("--run-dir", run_dir),
        )
    )


def options(script: str) -> set[str]:
    return {line[8:] for line in script.splitlines() if line.startswith("#SBATCH ")}


def test_resources_follow_from_the_cluster_section() -> None:
    assert "--gpus-per-node=8" in options(rendered())
    assert "--gres=gpu:8" in options(rendered(slurm={"gpu_option": "gres"}))
    assert "--cpus-per-task=16" in options(rendered(device="cpu", threads=2))
    assert "--no-kill" not in options(rendered())
    assert "--no-kill" in options(rendered(min_nodes=1))
    assert "--signal=B:USR1@180" in options(rendered(grace=120))
    keys = {"partition": "p", "account": "x", "qos": "q", "constraint": "a&b", "time": "2:00:00"}
    named = options(rendered(slurm=keys))
    assert {"--partition=p", "--account=x", "--qos=q", '--constraint="a&b"'} <= named
    assert "--time=2:00:00" in named


def test_the_same_job_gives_the_same_text_and_bash_reads_it() -> None:
    script = rendered(HOSTILE, f"/runs/{HOSTILE}", slurm={"setup": ["module load cuda  # new"]})
    assert script == rendered(
        HOSTILE, f"/runs/{HOSTILE}", slurm={"setup": ["module load cuda  # new"]}
    )
    read = subprocess.run(["bash", "-n"], input=script, text=True, capture_output=True, check=False)
    assert read.returncode == 0, read.stderr
    assert not read.stderr


def test_hostile_text_stays_text(tmp_path: Path) -> None:
    script = rendered(HOSTILE, f"/runs/{HOSTILE}")
    # Everything before the constant part, which would start Ray.
    assignments = script[: script.index("# shellcheck")]
    done = subprocess.run(
        ["bash", "-c", f'{assignments}\nprintf "%s\\n" "$run" "${{options[@]}}"; write_job'],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.splitlines() == [
        f"/runs/{HOSTILE}",
        "--run-dir",
        f"/runs/{HOSTILE}",
        f"name: {HOSTILE!r}",
    ]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("image", "here", "step_options", "in_step"),
    [
        (
            "/images/train.sif",
            "(apptainer exec --nv --bind /shared/runs /images/train.sif)",
            "()",
            "(apptainer exec --nv --bind /shared/runs /images/train.sif)",
        ),
        (
            "registry#pipeline:1",
            '(srun --overlap --nodes=1 --ntasks=1 --nodelist="$SLURMD_NODENAME" '
            "--kill-on-bad-exit=0 --container-image='registry#pipeline:1' "
            "--container-mounts=/shared/runs:/shared/runs,/tmp:/tmp)",
            "(--container-image='registry#pipeline:1' "
            "--container-mounts=/shared/runs:/shared/runs,/tmp:/tmp)",
            "()",
        ),
    ],
)
def test_containers(image: str, here: str, step_options: str, in_step: str) -> None:
    lines = rendered(slurm={"container": image}).splitlines()
    assert f"here={here}" in lines
    assert f"step_options={step_options}" in lines
    assert f"in_step={in_step}" in lines
    assert "pipeline=(python -m pipeline)" in lines
    assert not [line for line in lines if "PYTHONPATH" in line]


def test_states_are_read_whatever_the_name_is() -> None:
    for name in ("small", "a b", "JobState=FAILED Restarts=9", "x UserId=y JobState=FAILED"):
        state = parse_state(PENDING.format(name=name))
        assert (state.phase, state.reason, state.attempts) == ("pending", "Resources", 3)
        assert state.expected_start is not None
        assert state.exit_code is None


@pytest.mark.parametrize(
    ("word", "code", "phase", "exit_code"),
    [
        ("RUNNING", "0:0", "running", None),
        ("COMPLETING", "0:0", "running", None),
        ("COMPLETED", "0:0", "ended", 0),
        ("FAILED", "75:0", "ended", 75),
        ("CANCELLED", "75:0", "ended", 75),
        ("CANCELLED", "0:15", "ended", None),
        ("NODE_FAIL", "0:1", "ended", None),
    ],
)
def test_states(word: str, code: str, phase: str, exit_code: int | None) -> None:
    text = (
        PENDING.format(name="a")
        .replace("PENDING", word)
        .replace("ExitCode=0:0", f"ExitCode={code}")
    )
    state = parse_state(text)
    assert (state.phase, state.exit_code) == (phase, exit_code)
