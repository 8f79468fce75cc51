"""Kind kubernetes: runs as RayJobs of the KubeRay operator, through the API server.

The ID of a job is the name of its RayJob. A stop suspends it, as Kueue's preemption does; going on
is a new RayJob of the same run, for which the old one is deleted.
"""

from __future__ import annotations

import contextlib
import functools
import secrets
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from pipeline.cluster import kubernetes_checks, kubernetes_manifests, kubernetes_pods, pod_driver
from pipeline.cluster.kubernetes_client import ApiAnswer, KubernetesApi
from pipeline.cluster.kubernetes_manifests import QUEUE_LABEL
from pipeline.cluster.kubernetes_pods import RUN_LABEL, Manifest
from pipeline.cluster.kubernetes_state import SUBMITTER, RayJobView, reason_in, state_of
from pipeline.cluster.launcher import JobState, Submission, cause_in
from pipeline.command import command
from pipeline.config.schema import ClusterConfig
from pipeline.errors import ConfigError, StageError
from pipeline.layout import RunDir

ROLE = "configs/kubernetes/launcher_role.yaml"
_GONE_S = 60.0  # longest time that an ended RayJob needs to disappear
_CALL_S = 180.0  # longest time of a short command, the pull of the image included
_POLL_S = 0.5
_UID_LABEL = "kueue.x-k8s.io/job-uid"  # of a Workload


class KubernetesJobs:
    """The launcher of a Kubernetes cluster. See ``launcher.Launcher``."""

    def __init__(self, cluster: ClusterConfig) -> None:
        self._cluster = cluster

    @functools.cached_property
    def _api(self) -> KubernetesApi:
        kubernetes = self._cluster.kubernetes
        return KubernetesApi(kubernetes.context, kubernetes.namespace)

    def check(self, submission: Submission) -> None:
        """See ``kubernetes_checks``."""
        with self._refusals("the RayJob"):
            kubernetes_checks.check(self._api, submission)

    def render(self, submission: Submission) -> str:
        """The manifests."""
        return kubernetes_manifests.render(submission)

    def submit(self, submission: Submission) -> str:
        """Create the objects of the job; those of earlier submissions of the run are deleted."""
        names = kubernetes_manifests.names_of(submission)
        self._remove_earlier(names.run)
        *others, job = kubernetes_manifests.manifests(submission)
        with self._refusals(f"the RayJob {names.job}"):
            try:
                for manifest in others:
                    self._replace(manifest)
                created = self._api.create(job)
            except ApiAnswer:
                for manifest in others:
                    with contextlib.suppress(ApiAnswer):
                        self._api.delete(manifest["kind"], names.job)
                raise
            # With an owner they are deleted together with the RayJob.
            owner = {key: created[key] for key in ("apiVersion", "kind")} | {
                key: created["metadata"][key] for key in ("name", "uid")
            }
            for manifest in others:
                change = {"metadata": {"ownerReferences": [owner]}}
                self._api.patch(manifest["kind"], names.job, change)
        return names.job

    def state(self, job_id: str) -> JobState:
        """What the RayJob, its pods and its events tell."""
        with self._refusals(f"a look at {job_id}"):
            job = self._api.get("RayJob", job_id)
            if job is None:
                return JobState(phase="unknown", reason="there is no RayJob of this name any more")
            view = self._view(job)
            needs_reason = view.is_starting or view.deployment == "Failed"
            reason = self._reason(view) if needs_reason else ""
        return state_of(view, reason)

    def stop(self, job_id: str, *, now: bool) -> None:
        """Suspend the RayJob: its pods leave Ray, so the ranks save. ``now``: they are killed."""
        with self._refusals(f"the stop of {job_id}"):
            job = self._api.get("RayJob", job_id)
            if job is None:
                return
            workload = self._workload(job)
            if workload is not None:
                # Kueue would take back what others change about `suspend`.
                change = {"spec": {"active": False}}
                self._api.patch("Workload", workload["metadata"]["name"], change)
            else:
                self._api.patch("RayJob", job_id, {"spec": {"suspend": True}})
            for pod in self._pods(job) if now else ():
                self._api.delete("Pod", pod["metadata"]["name"], at_once=True)

    def log(self, job_id: str, run_dir: Path, offset: int) -> bytes:
        """The driver's output: of the file if it is seen here, else of the pod, else of the volume.

        The pod has the output of the present attempt only; the file that of all.
        """
        path = RunDir(run_dir).driver_log(job_id)
        with contextlib.suppress(FileNotFoundError), open(path, "rb") as file:
            file.seek(offset)
            return file.read()
        with self._refusals(f"the log of {job_id}"):
            job = self._api.get("RayJob", job_id)
            head = self._view(job).head if job is not None else None
            if head is not None:
                output, start = output_of_driver(self._submitter_log(head))
                # A mark at a later place: some of the output is only on the volume.
                if not output or start <= offset:
                    return output[max(0, offset - start) :]
            elif job is not None and self._view(job).is_starting:
                return b""
        code, output = self._run_pod(["tail", "-c", f"+{offset + 1}", str(path)])
        return output if code == 0 else b""  # there is no such file before the driver starts

    def call(self, cluster: ClusterConfig, arguments: Sequence[str]) -> str:
        """Run a short command of the pipeline in a pod with the volumes of the run."""
        code, output = self._run_pod(["python", "-m", "pipeline", *arguments])
        text = output.decode(errors="replace")
        if code != 0:
            raise StageError(
                f"`pipeline {' '.join(arguments)}` failed on the cluster: {cause_in(text)}",
                place=self._api.server,
            )
        return text

    def viewer(self, name: str, run_dir: Path) -> str:
        """Manifests of a TensorBoard in the cluster, with the commands to use it as comments."""
        run = RunDir(run_dir)
        service = f"tensorboard-{kubernetes_manifests.run_name(name, run_dir)}"
        options = [f"--namespace={self._api.namespace}"]
        if self._cluster.kubernetes.context:
            options.append(f"--context={self._cluster.kubernetes.context}")
        kubectl = f"kubectl {' '.join(options)}"
        this = command("tensorboard", name)
        port = kubernetes_pods.TENSORBOARD_PORT
        usage = [
            f"# TensorBoard of {name} in the cluster, on http://127.0.0.1:{port}:",
            f"#   {this} | {kubectl} apply -f -",
            f"#   {kubectl} port-forward service/{service} {port}",
            f"#   {this} | {kubectl} delete -f -",
        ]
        objects = kubernetes_pods.tensorboard(self._cluster, service, run)
        return "\n".join([*usage, kubernetes_manifests.as_yaml(objects)])

    def _remove_earlier(self, run: str) -> None:
        """Delete the RayJobs of earlier submissions.

        Raises:
            ConfigError: one of them is under way, or does not disappear.
        """
        # An ended RayJob stays in the cluster. Two of one run would write the same files, whoever
        # submitted them: the record of a run may be on another machine.
        with self._refusals("the earlier RayJobs of the run"):
            deadline = time.monotonic() + _GONE_S
            while earlier := self._api.select("RayJob", labels=f"{RUN_LABEL}={run}"):
                for job in earlier:
                    name = job["metadata"]["name"]
                    if "deletionTimestamp" in job["metadata"]:
                        continue
                    if state_of(self._view(job), "").under_way:
                        raise ConfigError(
                            f"the RayJob {name} is working on this run",
                            place=self._api.server,
                            remedy=f"stop it: `kubectl delete rayjob {name}`",
                        )
                    self._api.delete("RayJob", name)
                if time.monotonic() > deadline:
                    name = earlier[0]["metadata"]["name"]
                    raise ConfigError(
                        f"the RayJob {name} of an earlier attempt does not disappear",
                        place=self._api.server,
                        remedy="see whether KubeRay's operator runs: it has to let it go",
                    )
                time.sleep(_POLL_S)

    def _replace(self, manifest: Manifest) -> None:
        """Create an object; one that an interrupted submission has left behind is replaced."""
        try:
            self._api.create(manifest)
        except ApiAnswer as answer:
            if not answer.exists_already:
                raise
            self._api.delete(manifest["kind"], manifest["metadata"]["name"])
            self._api.create(manifest)

    def _view(self, job: Manifest) -> RayJobView:
        """A RayJob with its workload, its pods and the exit code of its driver."""
        view = RayJobView(
            job=job,
            workload=self._workload(job),
            pods=self._pods(job),
            needed=self._cluster.fewest_nodes,
        )
        # Only then is the log asked for: it is as long as the output.
        if view.status.get("jobStatus") != "STOPPED" or view.head is None:
            return view
        ended = pod_driver.ENDED.findall(self._submitter_log(view.head))
        return replace(view, exit_code=int(ended[-1]) if ended else None)

    def _pods(self, job: Manifest) -> list[Manifest]:
        cluster = (job.get("status") or {}).get("rayClusterName", "")
        return self._api.select("Pod", labels=f"ray.io/cluster={cluster}") if cluster else []

    def _workload(self, job: Manifest) -> Manifest | None:
        """The Workload that Kueue has made of a RayJob; None without a queue."""
        if QUEUE_LABEL not in job["metadata"].get("labels", {}):
            return None
        uid = job["metadata"]["uid"]
        workloads = self._api.select("Workload", labels=f"{_UID_LABEL}={uid}")
        return next(iter(workloads), None)

    def _reason(self, view: RayJobView) -> str:
        """Why the pods do not run: from the events of the job, its Ray cluster and one pod."""
        pod = view.stuck_pod
        names = [view.job["metadata"]["name"], view.status.get("rayClusterName", "")]
        if pod is not None:
            names.append(pod["metadata"]["name"])
        # Asked by name: a namespace may hold thousands of events of others.
        events: list[Manifest] = []
        for name in filter(None, names):
            events += self._api.select("Event", fields=f"involvedObject.name={name}")
        return reason_in(events, pod)

    def _submitter_log(self, head: Manifest) -> bytes:
        return self._api.log(head["metadata"]["name"], SUBMITTER)

    def _run_pod(self, words: Sequence[str]) -> tuple[int, bytes]:
        """(exit code, output) of a command in a pod of its own, which is deleted afterwards.

        Raises:
            ConfigError: the pod does not start, or the command does not end.
        """
        name = f"call-{secrets.token_hex(6)}"
        with self._refusals("a pod for a short command"):
            self._api.create(kubernetes_pods.reader(self._cluster, name, words))
            try:
                deadline = time.monotonic() + _CALL_S
                while True:
                    pod = self._api.get("Pod", name) or {}
                    if pod.get("status", {}).get("phase") in ("Succeeded", "Failed"):
                        break
                    if time.monotonic() > deadline:
                        events = self._api.select("Event", fields=f"involvedObject.name={name}")
                        raise ConfigError(
                            f"a pod for a short command does not end within {_CALL_S:g} s: "
                            f"{reason_in(events, pod) or 'it runs'}",
                            place=self._api.server,
                        )
                    time.sleep(_POLL_S)
                output = self._api.log(name, "reader")
                statuses = pod["status"].get("containerStatuses", [{}])
                ended = statuses[0].get("state", {}).get("terminated", {})
                return int(ended.get("exitCode", 1)), output
            finally:
                with contextlib.suppress(ApiAnswer):
                    self._api.delete("Pod", name, at_once=True)

    @contextlib.contextmanager
    def _refusals(self, wanted: str) -> Iterator[None]:
        """Turn a refusal of the server into a ConfigError. ``wanted``: such as "the RayJob a"."""
        try:
            yield
        except ApiAnswer as answer:
            place = f"{self._api.server}, namespace {self._api.namespace}"
            remedy = "correct the cluster section of the job"
            if answer.is_forbidden:
                remedy = f"an administrator allows it with {ROLE}"
            raise ConfigError(
                f"the cluster refuses {wanted}: {answer.cause}", place=place, remedy=remedy
            ) from None


def output_of_driver(log: bytes) -> tuple[bytes, int]:
    """(the driver's output, its place in the log of the run) in a log of the submitter.

    What the submitter writes before and after it is left out. (b"", 0) before the driver starts.
    """
    mark = pod_driver.MARK.search(log)
    if mark is None:
        return b"", 0
    ended = pod_driver.ENDED.search(log, mark.start())
    return log[mark.start() : ended.end() if ended else len(log)], int(mark[2])
