"""Runs as RayJobs: a real API server, stand-ins for KubeRay's operator and the kubelet.

``equal``: the bytes of the weights are those of an undisturbed run on one machine.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

from pipeline.files import file_digest
from pipeline.layout import RunDir
from pipeline.monitor.events import Event, read_events
from pipeline.orchestrate.cluster_run import cluster_run
from tests.cluster.api_server import NAMESPACE, Object
from tests.cluster.fabric import environment_of_machine
from tests.cluster.kuberay_stand_in import JOBS
from tests.cluster.kubernetes_site import KubernetesSite, kubernetes_cluster
from tests.cluster.processes import held, wait_until
from tests.cluster.ray_runs import CHECKPOINT_STEPS, PreparedJob

pytestmark = pytest.mark.shared  # KubeRay's definition
Record = Callable[[str, object], None]  # pytest's record_property: a column of the table
END_S = 900.0
ENDED = ("Complete", "Failed")
OWNED = (
    f"/api/v1/namespaces/{NAMESPACE}/configmaps",
    f"/apis/networking.k8s.io/v1/namespaces/{NAMESPACE}/networkpolicies",
    f"/api/v1/namespaces/{NAMESPACE}/pods",
)


@dataclass(kw_only=True)
class KubernetesRun:
    """A run that was submitted. ``name``: of its RayJob."""

    site: KubernetesSite
    run_dir: RunDir
    name: str

    @property
    def events(self) -> Sequence[Event]:
        path = self.run_dir.events("pretrain")
        return read_events(path) if path.exists() else []

    @property
    def step(self) -> int:
        return max((event.step for event in self.events), default=0)

    @property
    def starts(self) -> list[int]:
        """The steps at which groups of processes began."""
        return [event.step for event in self.events if event.kind == "start"]

    @property
    def log(self) -> str:
        path = self.run_dir.driver_log(self.name)
        return path.read_text(errors="replace") if path.exists() else "no log"

    def wait_for(self, condition: Callable[[], bool], aim: str) -> None:
        """Wait for a condition, which must come before the end of the job."""

        def met() -> bool:
            if condition():
                return True
            is_over = self.site.deployment(self.name) in ENDED
            assert not is_over or condition(), f"ended before {aim}:\n{self.log}"
            return False

        wait_until(met, aim, END_S, poll_s=0.3)

    def wait_for_step(self, step: int) -> None:
        self.wait_for(lambda: self.step >= step, f"step {step}")

    def finish(self) -> None:
        """Wait for the end of the job, which must be complete."""

        def ended() -> bool:
            return self.site.deployment(self.name) in ENDED

        wait_until(ended, f"the end of {self.name}", END_S, poll_s=0.3)
        job = self.site.job(self.name)
        assert job["status"]["jobDeploymentStatus"] == "Complete", f"{job['status']}\n{self.log}"

    def weights(self) -> str:
        return file_digest(self.run_dir.weights("pretrain"))


@dataclass(kw_only=True)
class User:
    """Submits runs of one job; each starts with prepared data."""

    site: KubernetesSite
    job: PreparedJob
    job_file: Path
    cluster_file: Path

    def call(self, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
        """``pipeline ARGUMENTS``, as a user types it."""
        return subprocess.run(
            [sys.executable, "-m", "pipeline", *map(str, arguments)],
            cwd=self.job.folder,
            env=environment_of_machine(self.site.environment),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
            timeout=END_S,
        )

    def start(self, name: str, *overrides: str) -> KubernetesRun:
        """Submit a run, and return at once."""
        return self.again(self.job.start_copy(name), *overrides)

    def again(self, run_dir: RunDir, *overrides: str) -> KubernetesRun:
        """The same command once more."""
        settings = [word for override in overrides for word in ("--set", override)]
        on = ("--on", self.cluster_file, "--run-dir", run_dir.path, "-d")
        done = self.call("run", self.job_file, *on, *settings)
        assert done.returncode == 0, done.stdout + done.stderr
        record = json.loads(run_dir.cluster_json.read_text())
        return KubernetesRun(site=self.site, run_dir=run_dir, name=record["id"])


@pytest.fixture(scope="module")
def site(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[KubernetesSite]:
    with kubernetes_cluster(tmp_path_factory.mktemp("kubernetes")) as site:
        yield site


@pytest.fixture(scope="module")
def user(site: KubernetesSite) -> User:
    job = PreparedJob(site.claim)
    job.prepare()
    job_file = site.claim / "job.yaml"
    job_file.write_text(job.text)
    cluster_file = site.cluster_file(site.claim, nodes=2)
    return User(site=site, job=job, job_file=job_file, cluster_file=cluster_file)


@pytest.fixture(scope="module")
def weights(user: User) -> str:
    """Digest of the weights of a run on one machine, with as many processes."""
    return user.job.undisturbed_weights()


@pytest.fixture(autouse=True)
def nothing_is_left(site: KubernetesSite) -> Iterator[None]:
    """A deleted RayJob leaves no object and no machine."""
    yield
    for job in site.server.items(JOBS):
        site.server.delete(f"{JOBS}/{job['metadata']['name']}")

    def left() -> list[Object]:
        return [
            entry
            for path in (JOBS, *OWNED)
            for entry in site.server.items(path)
            if entry["metadata"]["name"] != "kube-root-ca.crt"
        ]

    wait_until(lambda: not left(), "an empty namespace", END_S, poll_s=0.5)
    wait_until(lambda: not site.operator.kubelet.running, "no machine of a pod", END_S, poll_s=0.5)


def _ranks(site: KubernetesSite) -> list[int]:
    """The training processes in all pods, by their IDs on the host."""
    pods = list(site.operator.kubelet.running.values())
    return [pid for pod in pods for pid in pod.machine.pids("ray::Worker")]


def test_a_stopped_run_is_suspended_within_the_grace_and_loses_no_step(
    user: User, weights: str, record_property: Record
) -> None:
    began = time.monotonic()
    run = user.start("stopped")
    run.wait_for_step(CHECKPOINT_STEPS + 2)
    record_property("seconds to the first steps", round(time.monotonic() - began))
    asked = time.monotonic()
    with ThreadPoolExecutor() as commands:
        # The small job could end before the command has started.
        with held(_ranks(user.site)):
            stop = commands.submit(user.call, "stop", run.run_dir.path)
            wait_until(lambda: user.site.job(run.name)["spec"]["suspend"], "the stop", END_S, 0.3)
        done = stop.result()
    took = time.monotonic() - asked
    assert done.returncode == 0, done.stdout + done.stderr
    assert user.site.deployment(run.name) == "Suspended"
    stopped_at = run.step
    checkpoint = f"checkpoint at step {stopped_at} written"
    assert checkpoint in run.log, run.log
    # The same command continues at the step at which it stopped.
    second = user.again(run.run_dir)
    assert second.name != run.name
    second.finish()
    assert second.starts[-1] == stopped_at
    assert second.weights() == weights
    record_property("seconds to Suspended", round(took, 1))
    record_property("steps lost", 0)
    record_property("equal", True)


def test_a_suspended_job_that_a_scheduler_resumes_goes_through_the_same_path(
    user: User, weights: str, record_property: Record
) -> None:
    """As Kueue preempts and admits: it changes `suspend`, and no command of ours is called."""
    run = user.start("preempted")
    run.wait_for_step(CHECKPOINT_STEPS + 1)
    path = f"{JOBS}/{run.name}"
    user.site.server.patch(path, {"spec": {"suspend": True}})
    wait_until(lambda: user.site.deployment(run.name) == "Suspended", "Suspended", END_S, 0.3)
    stopped_at = run.step
    user.site.server.patch(path, {"spec": {"suspend": False}})
    run.finish()
    assert run.starts[-1] == stopped_at
    assert run.weights() == weights
    assert "attempt 2 of job" in run.log
    record_property("steps lost", 0)
    record_property("equal", True)


def test_a_run_outlives_the_loss_of_a_worker_pod(
    user: User, weights: str, record_property: Record
) -> None:
    run = user.start("worker")
    run.wait_for_step(CHECKPOINT_STEPS + 1)
    groups = len(run.starts)
    before = set(user.site.pods("worker"))
    user.site.delete_pod(sorted(before)[0], grace=0)  # as when its machine is gone
    run.wait_for(lambda: len(run.starts) > groups, "another group of processes")
    run.finish()
    assert run.weights() == weights
    assert not user.site.job(run.name)["status"].get("failed"), "the job was started again"
    record_property("resumed at", run.starts[-1])
    record_property("equal", True)


def test_a_run_outlives_the_loss_of_its_head(
    user: User, weights: str, record_property: Record
) -> None:
    run = user.start("head")
    run.wait_for_step(CHECKPOINT_STEPS + 1)
    first = user.site.pods("head")
    user.site.delete_pod(first[0], grace=0)
    run.finish()
    assert user.site.job(run.name)["status"]["failed"] == 1
    assert "attempt 2 of job" in run.log
    assert run.weights() == weights
    record_property("resumed at", run.starts[-1])
    record_property("equal", True)


def line_of(user: User, run: KubernetesRun) -> str:
    """The line of a run in the list of runs, with single spaces."""
    output = user.call("runs", "--runs-dir", user.job.folder).stdout
    lines = [" ".join(line.split()) for line in output.splitlines()]
    return next((line for line in lines if line.startswith(f"{run.run_dir.path.name} ")), "")


def why_it_waits(user: User, run: KubernetesRun) -> str:
    """In full; the table of runs folds long lines."""
    seen = cluster_run(run.run_dir)
    assert seen is not None
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KUBECONFIG", user.site.environment["KUBECONFIG"])
        return seen.state().reason


@pytest.mark.parametrize(
    ("name", "override", "reason"),
    [
        ("pull", "cluster.kubernetes.image=r.example/missing:1", "Failed to pull image"),
        ("gpus", "cluster.device=cuda", "0/3 nodes are available: 3 Insufficient nvidia.com/gpu"),
    ],
)
def test_a_job_that_cannot_start_shows_what_the_cluster_says(
    user: User, name: str, override: str, reason: str
) -> None:
    run = user.start(name, override)
    wait_until(lambda: reason in why_it_waits(user, run), reason, END_S, poll_s=0.5)
    # In the words of an event ("Failed"), or of the pod's state, which may be newer.
    assert re.match(rf"{name} pending: (Failed|ErrImagePull)", line_of(user, run))
    done = user.call("stop", run.run_dir.path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{name} pending" not in line_of(user, run)


def test_an_exceeded_quota_is_shown(user: User) -> None:
    path = f"/api/v1/namespaces/{NAMESPACE}/resourcequotas"
    user.site.server.create(path, {"metadata": {"name": "small"}, "spec": {"hard": {"pods": "0"}}})
    # A controller that does not run here would do this.
    status = {"hard": {"pods": "0"}, "used": {"pods": "0"}}
    user.site.server.patch(f"{path}/small/status", {"status": status})
    try:
        run = user.start("quota")
        reason = "exceeded quota: small"
        wait_until(lambda: reason in why_it_waits(user, run), reason, END_S, poll_s=0.5)
    finally:
        user.site.server.delete(f"{path}/small")
