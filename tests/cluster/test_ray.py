"""A job on a Ray cluster of three machines, through losses of every kind.

Undisturbed weights are the yardstick: "equal" means the bytes of ``weights.safetensors`` of a run
of two processes on one machine. Times are asserted with three times what is expected of them.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Protocol

import pytest

from pipeline.layout import RunDir
from tests.cluster.fabric import Fabric, FabricMachine, environment_of_machine
from tests.cluster.processes import held, wait_until
from tests.cluster.ray_runs import CHECKPOINT_STEPS, CLUSTER, ClusterRun
from tests.cluster.ray_site import RaySite
from tests.e2e.test_preparation_killed import JOB as PREPARATION
from tests.e2e.test_preparation_killed import files
from tests.prepare.source_folders import write_tar

PRETRAIN = ("--stage", "pretrain")
FIRST_STEPS = 10
GROUPS = 10


class Recorder(Protocol):
    """pytest's ``record_property``: a value for the table of results."""

    def __call__(self, name: str, value: object) -> None: ...


@pytest.fixture(scope="module")
def built(fabric: Fabric, shared_folder: Path) -> RaySite:
    site = RaySite(fabric, shared_folder)
    site.job.prepare()
    return site


@pytest.fixture
def site(built: RaySite) -> RaySite:
    built.repair()
    return built


@pytest.fixture
def two_machines(built: RaySite) -> RaySite:
    built.repair("n3")
    return built


@pytest.fixture(scope="module")
def reference(built: RaySite) -> RunDir:
    """The job on one machine."""
    run_dir = built.job.start_copy("reference")
    built.job.local(run_dir.path, *PRETRAIN, "--set", "cluster.processes=2")
    return run_dir


def weights(run_dir: RunDir) -> bytes:
    return run_dir.weights("pretrain").read_bytes()


def lose(machine: FabricMachine, loss: str) -> None:
    if loss == "raylet killed":
        [pid] = machine.pids("raylet/raylet")
        os.kill(pid, signal.SIGKILL)
    elif loss == "processes killed":
        machine.kill()
    elif loss == "link cut":
        machine.cut()
    else:
        machine.run("pkill", "-TERM", "-f", "pipeline node join")


@pytest.mark.parametrize("kind", ["wrong", "absent", "unreadable"])
def test_a_call_without_the_token_is_refused(
    site: RaySite, shared_folder: Path, record_property: Recorder, kind: str
) -> None:
    token = shared_folder / f"{kind}-token"
    variables = {"PIPELINE_RAY_ADDRESS": site.ray.gcs}
    if kind == "wrong":
        token.write_text("0" * 64)
    if kind != "absent":
        variables |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token)}
    command = [sys.executable, "-m", "tests.cluster.ask_token"]
    done = site.fabric["n1"].run(*command, environment=variables, check=False)
    seconds, code, *words = done.stdout.split()
    record_property("refused after", f"{seconds} s")
    assert float(seconds) < 3 * 2
    assert code == "2"
    expected = "cannot be read" if kind == "unreadable" else "refused the access token"
    assert expected in " ".join(words)
    assert "RAY_AUTH_TOKEN_PATH" in " ".join(words)


def test_a_machine_without_ranks_may_die(
    site: RaySite, reference: RunDir, record_property: Recorder
) -> None:
    """Also: the checks before the first stage pass."""
    run = site.start(site.job.start_copy("idle-dies"), *PRETRAIN, checks=True)
    run.wait_for_step(CHECKPOINT_STEPS)
    [idle] = {"n2", "n3"} - set(run.machines) or {"n3"}
    if idle not in run.machines:
        site.fabric[idle].kill()
    output = run.finish()
    record_property("groups of pretraining", len(run.starts))
    assert "check run directory:" in output
    assert len(run.starts) == 1
    assert weights(run.run_dir) == weights(reference)


@pytest.mark.parametrize(
    ("loss", "known_s", "most_lost"),
    [
        ("raylet killed", 5, CHECKPOINT_STEPS),
        ("processes killed", 5, CHECKPOINT_STEPS),
        ("link cut", 20, CHECKPOINT_STEPS),
        ("drained", 3, 0),
    ],
)
def test_a_lost_machine_costs_no_more_than_the_last_checkpoint(
    site: RaySite,
    reference: RunDir,
    record_property: Recorder,
    loss: str,
    known_s: float,
    most_lost: int,
) -> None:
    run = site.start(site.job.start_copy(loss.replace(" ", "-")), *PRETRAIN)
    run.wait_for_step(CHECKPOINT_STEPS + 3)
    name = next(name for name in run.machines if name != "n1")
    lose(site.fabric[name], loss)
    known = run.wait_for_output(r"is leaving: asking|error: pretrain: .*(died|failed)")
    run.wait_for_output("forming the group of processes again|restarting the processes")
    # Now: when the new group starts, it removes the steps that it repeats from the event log.
    reached = run.step
    output = run.finish()
    lost_steps = reached - run.starts[1]
    if loss == "link cut":
        site.fabric[name].kill()
    record_property("known after", f"{known:.1f} s")
    record_property("steps lost", f"{lost_steps} of {reached}")
    assert known < 3 * known_s
    assert 0 <= lost_steps <= most_lost
    assert weights(run.run_dir) == weights(reference)
    assert "\x1b[" not in output
    if loss == "drained":
        assert f"{name} (10.77.0.{name[1]}) is leaving: asking all ranks to stop" in output
        assert "restarting" not in output
    else:
        assert re.search(rf"process of rank \d on {name} \(10\.77\.0\.\d\) died", output)


def test_a_run_continues_on_what_is_left_and_grows_back(
    two_machines: RaySite, reference: RunDir, record_property: Recorder
) -> None:
    site = two_machines
    often = ("--set", "stages.pretrain.checkpoint_every_steps=2")
    run = site.start(site.job.start_copy("shrinks"), *PRETRAIN, *often, min_nodes=1)
    run.wait_for_step(CHECKPOINT_STEPS + 2)
    site.fabric["n2"].kill()
    run.wait_for_output(r"\nrank 0 on n1 \(10\.77\.0\.1\)\n")
    wait_until(lambda: len(run.losses(1)) >= FIRST_STEPS, "steps of one process", 60)
    # The small job would be done before the machine has booted.
    with held(site.fabric["n1"].pids("ray::Worker")):
        site.repair("n3")
    output = run.finish()
    first = ClusterRun(run_dir=reference, process=run.process).losses(0)
    alone = run.losses(1)
    differences = [abs(alone[step] - first[step]) for step in sorted(alone)[:FIRST_STEPS]]
    record_property("largest difference of the loss", f"{max(differences):.1e}")
    record_property("groups", run.starts)
    assert max(differences) < 1e-5
    assert "n2 (10.77.0.2) can join: asking all ranks to stop" in output
    assert run.machines == ["n1", "n2"]
    assert len(run.starts) == 3


def test_too_few_machines_end_the_run_and_it_resumes_after_the_loss_of_the_head(
    two_machines: RaySite, reference: RunDir, record_property: Recorder
) -> None:
    site = two_machines
    run_dir = site.job.start_copy("resumes")
    run = site.start(run_dir, *PRETRAIN, wait=4)
    run.wait_for_step(CHECKPOINT_STEPS + 2)
    site.fabric["n2"].kill()
    output = run.finish(75)
    assert re.search(
        r"the run needs 2 machines \(cluster\.min_nodes\); here after 4 s \(cluster\.wait\): "
        r"n1 \(10\.77\.0\.1\); missing: n2",
        output,
    )
    # The same command, and the head's machine dies with the driver on it.
    site.repair("n3")
    run = site.start(run_dir, *PRETRAIN, wait=4)
    run.wait_for_step(3 * CHECKPOINT_STEPS + 2)
    site.fabric["n1"].kill()
    run.process.wait(10)
    site.repair("n3")
    run = site.start(run_dir, *PRETRAIN, wait=4)
    run.finish()
    record_property("attempts begin at steps", run.starts)
    assert run.starts[1:] == [CHECKPOINT_STEPS, 3 * CHECKPOINT_STEPS]
    assert weights(run_dir) == weights(reference)


def test_machines_that_cannot_share_the_batch_are_idle(
    site: RaySite, record_property: Recorder
) -> None:
    """A batch of 16 is not shared by three machines. The fourth never comes."""
    run = site.start(site.job.start_copy("idle"), *PRETRAIN, nodes=4, min_nodes=2, wait=3)
    run.wait_for_output(r"rank 0 on n\d .*, rank 1 on n\d .*; idle: n\d \(")
    run.wait_for_step(1)
    run.process.terminate()
    output = run.finish(75)
    assert "continuing without 1 that never joined the Ray cluster" in output
    record_property("machines used", run.machines)


def test_ranks_are_numbered_by_machine_in_every_group(
    two_machines: RaySite, shared_folder: Path, record_property: Recorder
) -> None:
    site = two_machines
    variables = {**site.ray.environment, "PIPELINE_RAY_ADDRESS": site.ray.gcs}
    command = [sys.executable, "-m", "tests.cluster.form_groups", shared_folder, str(GROUPS)]
    done = site.fabric["n1"].run(*command, environment=variables, timeout=600)
    line = "ranks 0-1 on n1 (10.77.0.1), ranks 2-3 on n2 (10.77.0.2); local 0 1 0 1"
    groups = Counter(done.stdout.splitlines())
    record_property("groups", groups[line])
    assert groups == {line: GROUPS}


def _prepared(run_dir: RunDir) -> dict[str, bytes]:
    folder = run_dir.dataset("images")
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def _shares(output: str) -> dict[str, int]:
    line = output.rpartition("tasks by machine: ")[2].splitlines()[0]
    return {name: int(count) for name, count in re.findall(r"(n\d) \(\S+\) (\d+)", line)}


def test_preparation_spreads_and_survives_the_loss_of_a_machine(
    site: RaySite, shared_folder: Path, record_property: Recorder
) -> None:
    source = shared_folder / "many"
    for label in range(24):
        write_tar(source / "train" / f"c{label}.tar", files(label, "train", 20))
        write_tar(source / "val" / f"c{label}.tar", files(label, "val", 4))
    job = shared_folder / "many.yaml"
    cluster = CLUSTER.format(nodes=3, devices=1, min_nodes=2, wait=60)
    job.write_text(PREPARATION.format(root=source) + cluster)
    local = RunDir(shared_folder / "many-local")
    command = [sys.executable, "-m", "pipeline", "run", str(job)]
    command += ["--run-dir", str(local.path), "--set", "cluster={device: cpu}"]
    subprocess.run(command, check=True, env=environment_of_machine())
    counts = {}
    for name in ("spread", "disturbed"):
        run_dir = RunDir(shared_folder / f"many-{name}")
        run_dir.path.mkdir()
        run = site.start(run_dir, job=job)
        if name == "disturbed":
            victim = site.fabric["n3"]
            wait_until(lambda victim=victim: victim.pids("ray::_apply"), "a task on n3", 120)
            victim.kill()
        counts[name] = _shares(run.finish())
        record_property(name, counts[name])
        assert _prepared(run_dir) == _prepared(local)
    assert set(counts["spread"]) == {"n1", "n2", "n3"}
    assert min(counts["spread"].values()) >= sum(counts["spread"].values()) / 10
    # Every task counts once: those that n3 had finished were not run again.
    assert sum(counts["disturbed"].values()) == sum(counts["spread"].values())
