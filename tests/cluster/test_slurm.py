"""Runs under a real Slurm: every way in which it ends a job, and what each costs.

``equal``: the bytes of the weights are those of an undisturbed run.
"""

from __future__ import annotations

import re
import stat
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pipeline.cluster.slurm_script import REQUEUES
from pipeline.files import file_digest
from pipeline.layout import RunDir
from tests.cluster.exposure import beyond_loopback, places_of
from tests.cluster.processes import held, wait_until
from tests.cluster.ray_runs import PreparedJob
from tests.cluster.slurm_machines import SlurmMachines
from tests.cluster.slurm_runs import SlurmRun, Submitter, wait_for_nothing_left

Record = Callable[[str, object], None]  # pytest's record_property: a column of the table
WARNING_S = 90  # grace (30) and a minute: when the script is warned of the time limit
STOPPING = "stopping after the current step"


@pytest.fixture(scope="module")
def submitter(slurm: SlurmMachines, shared_folder: Path) -> Submitter:
    job = PreparedJob(shared_folder)
    job.prepare()
    return Submitter(slurm=slurm, job=job)


@pytest.fixture(scope="module")
def weights(submitter: Submitter) -> str:
    """Digest of the weights of a run on one machine, with as many processes."""
    return submitter.job.undisturbed_weights()


@pytest.fixture(autouse=True)
def clean_machines(slurm: SlurmMachines) -> Iterator[None]:
    """No job leaves a process or a file on any machine."""
    yield
    slurm.run("scancel", "--user=root")
    wait_for_nothing_left(slurm)


def _resumed(run: SlurmRun, at: int, groups: int) -> int:
    """Wait for the group of that number to compute a step; returns the steps that were lost.

    Args:
        at: the step that had been computed when the disturbance began.
    """
    run.wait_for(lambda: len(run.starts) >= groups, f"group {groups} of processes")
    start = run.starts[groups - 1]
    run.wait_for_step(start + 1)
    return max(0, at - start)


def test_two_jobs_at_once_complete_and_are_equal(
    submitter: Submitter, weights: str, record_property: Record
) -> None:
    began = time.monotonic()
    runs = [submitter.start("first"), submitter.start("second")]
    runs[0].wait_for_step(1)
    _no_secret_is_shown(submitter.slurm, runs[0])
    for run in runs:
        run.finish("COMPLETED")
        assert run.weights() == weights
        assert run.attempts == 1
        assert not run.run_dir.ray_token.exists()
    machines = {run.info["NodeList"] for run in runs}
    assert machines == {"n[1-2]"}, "the jobs do not share machines"
    record_property("seconds for both", round(time.monotonic() - began))
    record_property("equal", True)


def _no_secret_is_shown(slurm: SlurmMachines, run: SlurmRun) -> None:
    """The token is in one file, which only its owner reads, while the job runs."""
    file = run.run_dir.ray_token
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    token = file.read_bytes()
    assert len(token) == 64
    script = run.run_dir.path / "script-of-slurm"
    slurm.run("scontrol", "write", "batch_script", run.job_id, script)
    machines = slurm.fabric.machines.values()
    assert places_of(token, machines, [run.run_dir.path], allowed=[file]) == []
    ports = {at.rpartition(":")[2] for machine in machines for at in beyond_loopback(machine)}
    assert "8265" not in ports, "a dashboard"


def _ranks(slurm: SlurmMachines) -> list[int]:
    """The training processes of a run on two machines, by their IDs on the host."""
    ranks = [pid for name in ("n1", "n2") for pid in slurm.fabric[name].pids("ray::Worker")]
    assert len(ranks) == 2
    return ranks


def _preempt(slurm: SlurmMachines, run: SlurmRun) -> None:
    """Submit a job, of a higher partition, that needs all machines; hold the ranks until it acts.

    Slurm takes seconds to decide, in which the small job could end.
    """
    attempts = run.attempts
    begin = len(run.log)

    def acts() -> bool:
        news = run.log[begin:]
        return STOPPING in news or "is leaving" in news or run.attempts > attempts

    options = ["--partition=urgent", "--nodes=3", "--cpus-per-task=2", "--output=/dev/null"]
    with held(_ranks(slurm)):
        slurm.run("sbatch", *options, "--wrap", "true")
        run.wait_for(acts, "the preemption")


def _warn_of_the_time_limit(slurm: SlurmMachines, run: SlurmRun) -> None:
    """Shorten the limit so that the warning is due, and hold the ranks until it has come.

    Slurm looks for it every 30 s only, in which the small job would end.
    """
    hours, minutes, seconds = map(int, run.info["RunTime"].split(":"))
    limit = (hours * 3600 + minutes * 60 + seconds + WARNING_S) // 60 + 1
    with held(_ranks(slurm)):
        slurm.run("scontrol", "update", f"JobId={run.job_id}", f"TimeLimit={limit}")
        run.wait_for(lambda: STOPPING in run.log, "the warning", 180)
        # At once: the next attempt would be warned too, before its first step on a busy machine.
        slurm.run("scontrol", "update", f"JobId={run.job_id}", "TimeLimit=60")


def test_time_limit_and_preemption_with_a_grace_cost_no_step(
    slurm: SlurmMachines, submitter: Submitter, weights: str, record_property: Record
) -> None:
    run = submitter.start("limit")
    run.wait_for_step(8)
    _warn_of_the_time_limit(slurm, run)
    lost = [_resumed(run, 8, 2)]
    at = run.step
    _preempt(slurm, run)
    lost.append(_resumed(run, at, 3))
    run.finish("COMPLETED")
    assert run.attempts == 3
    assert lost == [0, 0]
    assert run.weights() == weights
    record_property("steps lost", lost)
    record_property("equal", True)


def test_preemption_without_a_grace_and_a_killed_machine(
    slurm: SlurmMachines, submitter: Submitter, weights: str, record_property: Record
) -> None:
    run = submitter.start("abrupt", partition="abrupt")
    run.wait_for_step(8)
    at = run.step
    _preempt(slurm, run)
    lost = _resumed(run, at, 2)
    assert lost == 0

    slurm.fabric["n2"].kill()
    run.wait_for(lambda: run.attempts == 3, "the next attempt")
    run.finish("COMPLETED")
    assert run.info["NodeList"] == "n[1,3]"
    assert run.weights() == weights
    slurm.again("n2")
    record_property("steps lost by the preemption", lost)
    record_property("groups of processes began at", run.starts)
    record_property("equal", True)


def test_stop_and_scancel_end_the_run_and_the_same_command_resumes_it(
    slurm: SlurmMachines, submitter: Submitter, weights: str, record_property: Record
) -> None:
    first = submitter.start("ended")
    first.wait_for_step(8)
    at = first.step
    with held(_ranks(slurm)):  # while the command starts
        stop = slurm.login.popen(
            *("python", "-m", "pipeline", "stop", first.run_dir.path),
            environment=slurm.environment,
            output=subprocess.PIPE,
        )
        first.wait_for(lambda: STOPPING in first.log, "the stop")
    output, _ = stop.communicate(timeout=180)
    assert "stopped" in output
    assert first.state == "FAILED"
    assert first.info["ExitCode"] == "75:0"
    wait_for_nothing_left(slurm)

    second = submitter.again(first)
    lost = [_resumed(second, at, 2)]
    at = second.step
    slurm.run("scancel", second.job_id)
    second.finish("CANCELLED")
    ended = time.monotonic()
    wait_for_nothing_left(slurm)

    third = submitter.again(first)
    lost.append(_resumed(third, at, 3))
    third.finish("COMPLETED")
    assert lost == [0, 0]
    assert third.weights() == weights
    # The first two have not been requeued, nor will they be.
    wait_until(lambda: time.monotonic() > ended + 60, "a minute", 90)
    assert (first.state, first.attempts) == ("FAILED", 1)
    assert (second.state, second.attempts) == ("CANCELLED", 1)
    record_property("steps lost", lost)
    record_property("equal", True)


def test_a_machine_less_is_enough(
    slurm: SlurmMachines, submitter: Submitter, record_property: Record
) -> None:
    run = submitter.start("fewer", min_nodes=1)
    run.wait_for_step(8)
    slurm.fabric["n2"].kill()
    run.finish("COMPLETED")
    assert run.attempts == 1
    assert run.run_dir.weights("pretrain").exists()
    slurm.again("n2")
    record_property("groups of processes began at", run.starts)


def test_a_failing_job_ends_with_its_cause(submitter: Submitter) -> None:
    run = submitter.start("failing")
    # The first checkpoint, at step 6, cannot be written.
    run.run_dir.checkpoints("pretrain").parent.mkdir(exist_ok=True)
    run.run_dir.checkpoints("pretrain").write_text("a file, not a folder")
    run.finish("FAILED")
    assert run.info["ExitCode"] == "3:0"
    assert run.attempts == 1
    end = "\n".join(run.log.splitlines()[-10:])
    assert "error: " in end
    assert "the final checkpoint cannot be written" in end
    assert re.search(r"\(rank [01] on n[12] ", end)


def test_without_progress_it_is_not_requeued_for_ever(
    submitter: Submitter, slurm: SlurmMachines
) -> None:
    # The second machine never joins.
    run = submitter.start("stuck", setup=["test $(hostname) = n1"], wait=5)
    run.finish("FAILED", seconds=600)
    assert run.info["ExitCode"] == "75:0"
    assert run.attempts == REQUEUES + 1
    assert "missing: n2" in run.log
    assert run.log.count("srun: error: n2: task 0: Exited with exit code 1") == run.attempts
    assert f"not requeued: {REQUEUES} attempts in a row without a new checkpoint" in run.log


@pytest.mark.parametrize("name", ["a; rm -rf x", "A" * 64, "Größe-ü", "$(touch x) `touch x` #k %j"])
def test_names_stay_what_they_are(submitter: Submitter, slurm: SlurmMachines, name: str) -> None:
    job = submitter.job.folder / "named.yaml"
    folder = submitter.job.folder / f"named-{abs(hash(name))}"
    job.write_text(submitter.job.text.replace("name: small", f"name: {name!r}"))
    cluster = submitter.job.folder / "named-cluster.yaml"
    cluster.write_text(
        f"kind: slurm\nnodes: 2\ndevice: cpu\nruns: {folder.parent}\n"
        'slurm: {extra: ["--hold", "--comment=a b"]}\n'
    )
    run = submitter.submit(job, RunDir(folder), "--on", str(cluster))
    assert run.state == "PENDING"
    shown = slurm.run("squeue", "--noheader", f"--jobs={run.job_id}", "--format=%j")
    assert shown.rstrip("\n") == name
    slurm.login.run("python", "-m", "pipeline", "stop", folder, environment=slurm.environment)
    assert run.state == "CANCELLED"


def test_machines_that_failed_the_checks_are_excluded(
    submitter: Submitter, slurm: SlurmMachines
) -> None:
    run_dir = submitter.job.start_copy("excluding")
    cluster = submitter.job.folder / "excluding-cluster.yaml"
    cluster.write_text(
        f"kind: slurm\nnodes: 2\ndevice: cpu\nruns: {submitter.job.folder}\n"
        'slurm: {extra: ["--hold"]}\n'
    )
    job = submitter.job.folder / "excluding.yaml"
    job.write_text(submitter.job.text)
    run_dir.unfit.write_text("n2\n")
    run = submitter.submit(job, run_dir, "--on", str(cluster))
    assert run.info["ExcNodeList"] == "n2"
    slurm.run("scancel", run.job_id)
    run_dir.unfit.write_text("n2\nn3\n")
    refused = slurm.login.run(
        *("python", "-m", "pipeline", "run", job, "--run-dir", run_dir.path, "--on", cluster),
        *("--set", "cluster.slurm.extra=[]"),  # Slurm accepts a held job in any case
        environment=slurm.environment,
        check=False,
    )
    assert refused.returncode == 2
    assert f"{run_dir.unfit}: too few machines are left" in refused.stderr


@pytest.mark.parametrize(
    ("option", "key", "cause"),
    [
        ("slurm.partition=nope", "partition", "Invalid partition"),
        ("slurm.constraint=nope", "constraint", "Invalid feature"),
        ("nodes=8", "", "node configuration is not available"),
    ],
)
def test_what_slurm_refuses_is_not_submitted(
    submitter: Submitter, slurm: SlurmMachines, option: str, key: str, cause: str
) -> None:
    cluster = submitter.job.folder / "refused-cluster.yaml"
    cluster.write_text(f"kind: slurm\nnodes: 2\ndevice: cpu\nruns: {submitter.job.folder}\n")
    job = submitter.job.folder / "refused.yaml"
    job.write_text(submitter.job.text)
    done = slurm.login.run(
        *("python", "-m", "pipeline", "run", job, "--run-dir", submitter.job.folder / "refused"),
        *("-d", "--on", cluster, "--set", f"cluster.{option}"),
        environment=slurm.environment,
        check=False,
    )
    assert done.returncode == 2, done.stdout + done.stderr
    assert cause in done.stderr
    assert f"cluster.slurm{'.' if key else ''}{key}" in done.stderr
    assert "sinfo" in done.stderr
    assert not slurm.run("squeue", "--noheader").strip()


def test_inside_an_allocation_it_runs_there(
    slurm: SlurmMachines, submitter: Submitter, weights: str
) -> None:
    run_dir = submitter.job.start_copy("inside")
    cluster = submitter.job.folder / "inside-cluster.yaml"
    cluster.write_text(
        f"kind: slurm\nnodes: 2\ndevice: cpu\nthreads: 1\nloader_threads: 1\ngrace: 30\nwait: 60\n"
        f"runs: {submitter.job.folder}\n"
    )
    job = submitter.job.folder / "job.yaml"
    job.write_text(submitter.job.text)
    done = slurm.login.run(
        *("salloc", "--nodes=2", "--ntasks-per-node=1", "python", "-m", "pipeline", "run", job),
        *("--run-dir", run_dir.path, "--on", cluster),
        environment=slurm.environment,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "checkpoint at step 42 written" in done.stdout
    assert file_digest(run_dir.weights("pretrain")) == weights
