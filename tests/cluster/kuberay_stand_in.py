"""As much of KubeRay's operator as RayJobs in SidecarMode need; pods run on machines of the tests.

Commands, order and rules are those of its source (release 1.7): the submitter is a second container
of the head's pod, a lost head fails the job, a failed job gets a new cluster under `backoffLimit`,
suspending deletes the cluster and nothing else. It also collects what a deleted RayJob owned, as
Kubernetes' own collector would.
"""

from __future__ import annotations

import contextlib
import copy
import json
import secrets
import threading
import time
import traceback
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

from tests.cluster.api_server import NAMESPACE, ApiServer, Object, Refused
from tests.cluster.fabric import Fabric
from tests.cluster.kubelet_stand_in import PODS, KubeletStandIn, now, write_event
from tests.cluster.kuberay_commands import DASHBOARD, flags, submit_command

JOBS = f"/apis/ray.io/v1/namespaces/{NAMESPACE}/rayjobs"
_OWNED = (
    f"/api/v1/namespaces/{NAMESPACE}/configmaps",
    f"/apis/networking.k8s.io/v1/namespaces/{NAMESPACE}/networkpolicies",
    PODS,
)
_FINALIZER = "ray.io/rayjob-finalizer"
_SUBMITTER = "ray-job-submitter"
_TERMINAL = ("SUCCEEDED", "FAILED", "STOPPED")
_PERIOD_S = 0.3


@dataclass(kw_only=True)
class _Cluster:
    """What the operator knows of a Ray cluster."""

    name: str
    token: str = field(default_factory=lambda: secrets.token_hex(32))
    head: str = ""  # its pod
    is_up: bool = False  # the head answers


@dataclass(kw_only=True)
class _Pod:
    """A pod to create. ``start``: the command of its first container."""

    name: str
    role: str
    template: Object
    start: str


class KubeRayStandIn:
    """The operator and the kubelet, in a thread, until ``close``."""

    def __init__(self, server: ApiServer, fabric: Fabric, logs: Path) -> None:
        self.server = server
        self.kubelet = KubeletStandIn(server, fabric, logs)
        self.statuses: list[tuple[str, str]] = []  # (RayJob, jobDeploymentStatus), as they came
        self.faults: list[str] = []  # tracebacks of the stand-in itself
        self._clusters: dict[str, _Cluster] = {}
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="operator", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """End the thread and all pods. Raises AssertionError if the stand-in had a fault."""
        self._closed.set()
        self._thread.join()
        self.kubelet.close()
        assert not self.faults, self.faults[0]

    def _run(self) -> None:
        while not self._closed.wait(_PERIOD_S):
            try:
                for job in self.server.items(JOBS):
                    self._reconcile(job)
                self._collect()
                self.kubelet.step()
            except Refused as refused:
                if refused.code not in (404, 409):  # somebody else has changed the object meanwhile
                    self.faults.append(traceback.format_exc())
            except Exception:
                self.faults.append(traceback.format_exc())

    def _reconcile(self, job: Object) -> None:
        name = job["metadata"]["name"]
        status = job.get("status") or {}
        if "deletionTimestamp" in job["metadata"]:
            if status.get("jobStatus") not in _TERMINAL:
                self._dashboard(status, f"/api/jobs/{status.get('jobId')}/stop", post=True)
            self.server.patch(f"{JOBS}/{name}", {"metadata": {"finalizers": None}})
            return
        steps = {
            "": self._new,
            "Initializing": self._initializing,
            "Running": self._running,
            "Suspending": self._release,
            "Retrying": self._release,
            "Suspended": self._suspended,
            "Complete": self._finished,
            "Failed": self._finished,
        }
        deployment = status.get("jobDeploymentStatus", "")
        change = steps[deployment](job, status)
        if change is None:
            return
        change = self._with_retry(job, status | change, change)
        self.server.patch(f"{JOBS}/{name}/status", {"status": change})
        after = change.get("jobDeploymentStatus", deployment)
        if after != deployment:
            self.statuses.append((name, after))

    def _with_retry(self, job: Object, status: Object, change: Object) -> Object:
        """A failed job gets a new cluster, up to `backoffLimit` times; none after a deadline."""
        if change.get("jobDeploymentStatus") not in ("Complete", "Failed"):
            return change
        change["endTime"] = now()
        if change["jobDeploymentStatus"] == "Failed":
            failed = change["failed"] = int(status.get("failed") or 0) + 1
            retries = failed < job["spec"].get("backoffLimit", 0) + 1
            if retries and change.get("reason") != "DeadlineExceeded":
                change["jobDeploymentStatus"] = "Retrying"
        return change

    def _new(self, job: Object, status: Object) -> Object:
        name = job["metadata"]["name"]
        if not job["metadata"].get("finalizers"):
            self.server.patch(f"{JOBS}/{name}", {"metadata": {"finalizers": [_FINALIZER]}})
        cluster = f"{name}-{_suffix()}"
        self._clusters[cluster] = _Cluster(name=cluster)
        return {
            "jobDeploymentStatus": "Initializing",
            "jobId": f"{name}-{_suffix()}",
            "rayClusterName": cluster,
            "jobStatus": "",
            "startTime": now(),
        }

    def _initializing(self, job: Object, status: Object) -> Object | None:
        if job["spec"].get("suspend"):
            return {"jobDeploymentStatus": "Suspending"}
        deadline = job["spec"].get("preRunningDeadlineSeconds")
        if deadline is not None and _age(status["startTime"]) > deadline:
            message = "The RayJob has passed the preRunningDeadlineSeconds."
            return _failed("DeadlineExceeded", message)
        pods = self._ensure_pods(job, status)
        wanted = 1 + job["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]["replicas"]
        ready = [pod for pod in pods if pod["status"]["phase"] == "Running"]
        cluster = self._clusters[status["rayClusterName"]]
        if len(ready) < wanted or not cluster.is_up:
            return None
        return {"jobDeploymentStatus": "Running", "dashboardURL": f"{cluster.name}-head-svc:8265"}

    def _running(self, job: Object, status: Object) -> Object | None:
        if job["spec"].get("suspend"):
            return {"jobDeploymentStatus": "Suspending"}
        cluster = self._clusters[status["rayClusterName"]]
        head = self.server.get(f"{PODS}/{cluster.head}")
        if head is None:
            return _failed("AppFailed", "Ray head pod not found.")
        self._ensure_pods(job, status)
        code = _exit_code(head, _SUBMITTER)
        if code:
            if status.get("jobStatus") == "FAILED":
                return _failed("AppFailed", status.get("message", ""))
            message = f"Ray head pod container {_SUBMITTER} terminated with exit code {code}: Error"
            return _failed("SubmissionFailed", message)
        details = self._dashboard(status, f"/api/jobs/{status['jobId']}")
        if not details or "status" not in details:
            return None
        change = {"jobStatus": details["status"], "message": details.get("message") or ""}
        if details["status"] in _TERMINAL and code is not None:
            is_failed = details["status"] == "FAILED"
            change["jobDeploymentStatus"] = "Failed" if is_failed else "Complete"
            change["reason"] = "AppFailed" if is_failed else ""
        return change if any(status.get(key) != value for key, value in change.items()) else None

    def _release(self, job: Object, status: Object) -> Object | None:
        """Delete the cluster; when nothing of it is left, the job is suspended or new."""
        pods = self._pods(status)
        for pod in pods:
            if "deletionTimestamp" not in pod["metadata"]:
                self.server.delete(f"{PODS}/{pod['metadata']['name']}")
        if pods:
            return None
        suspended = status["jobDeploymentStatus"] == "Suspending"
        cleared = ("jobId", "rayClusterName", "dashboardURL", "message", "reason", "jobStatus")
        return {
            **dict.fromkeys(cleared, ""),
            "jobDeploymentStatus": "Suspended" if suspended else "",
        }

    def _suspended(self, job: Object, status: Object) -> Object | None:
        return None if job["spec"].get("suspend") else {"jobDeploymentStatus": ""}

    def _finished(self, job: Object, status: Object) -> None:
        if _age(status["endTime"]) > job["spec"].get("ttlSecondsAfterFinished", 0):
            for pod in self._pods(status):
                if "deletionTimestamp" not in pod["metadata"]:
                    self.server.delete(f"{PODS}/{pod['metadata']['name']}")

    def _pods(self, status: Object) -> list[Object]:
        name = status.get("rayClusterName")
        return self.server.items(PODS, f"ray.io/cluster={name}") if name else []

    def _ensure_pods(self, job: Object, status: Object) -> list[Object]:
        """Create the pods that are missing; returns those that are there."""
        cluster = self._clusters[status["rayClusterName"]]
        spec = job["spec"]["rayClusterSpec"]
        pods = self._pods(status)
        try:
            if not cluster.head:
                self._create_head(job, status, cluster)
            group = spec["workerGroupSpecs"][0]
            workers = [
                pod
                for pod in pods
                if pod["metadata"]["labels"]["ray.io/node-type"] == "worker"
                and "deletionTimestamp" not in pod["metadata"]
                and pod["status"]["phase"] not in ("Failed", "Succeeded")
            ]
            for _ in range(group["replicas"] - len(workers)):
                self._create_worker(job, cluster, group)
            cluster.is_up = cluster.is_up or bool(self._dashboard(status, "/api/version"))
        except Refused as refused:
            about = {"kind": "RayCluster", "name": cluster.name, "namespace": NAMESPACE}
            message = f"Failed to create Pod {NAMESPACE}/: {refused.message}"
            write_event(self.server, about, "Warning", "FailedToCreateHeadPod", message)
        return pods

    def _create_head(self, job: Object, status: Object, cluster: _Cluster) -> None:
        group = job["spec"]["rayClusterSpec"]["headGroupSpec"]
        name = f"{cluster.name}-head-{_suffix()}"
        container = group["template"]["spec"]["containers"][0]
        submitter = {
            "name": _SUBMITTER,
            "image": container["image"],
            "imagePullPolicy": container["imagePullPolicy"],
            "command": ["/bin/bash", "-ce", "--"],
            "args": [submit_command(job, status)],
            "resources": {"limits": {"cpu": "1"}, "requests": {"cpu": "500m"}},
        }
        options = {"block": "true", "dashboard-agent-listen-port": "52365"}
        start = f"ray start --head {flags(group['rayStartParams'] | options)}"
        pod = _Pod(name=name, role="head", template=group["template"], start=start)
        self._create_pod(job, cluster, pod, [submitter])
        cluster.head = name

    def _create_worker(self, job: Object, cluster: _Cluster, group: Object) -> None:
        name = f"{cluster.name}-{group['groupName']}-worker-{_suffix()}"
        options = {"address": "$(HEAD_IP):6379", "block": "true"}
        start = f"ray start {flags(group['rayStartParams'] | options)}"
        pod = _Pod(name=name, role="worker", template=group["template"], start=start)
        # In KubeRay's pods an init container waits for the head.
        self.kubelet.head_of[name] = lambda: self._address_of_head(cluster)
        self._create_pod(job, cluster, pod, [])

    def _address_of_head(self, cluster: _Cluster) -> str:
        """Where the head of a cluster is; "" while it is not up."""
        running = self.kubelet.running.get(cluster.head)
        return running.machine.address if running is not None and cluster.is_up else ""

    def _create_pod(self, job: Object, cluster: _Cluster, pod: _Pod, others: list[Object]) -> None:
        template = pod.template
        labels = {"ray.io/cluster": cluster.name, "ray.io/node-type": pod.role}
        spec = copy.deepcopy(template["spec"])
        ray = spec["containers"][0]
        ray["command"] = ["/bin/bash", "-c", "--"]
        # The machines of the tests have no route by which Ray could choose its address.
        ray["args"] = [f"ulimit -n 65536 2>/dev/null; {pod.start} --node-ip-address=$(POD_IP)"]
        spec["containers"] += others
        self.kubelet.variables[pod.name] = {
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": cluster.token,
            "RAY_CLUSTER_NAME": cluster.name,
            # A machine under load must not lose its dashboard for good.
            "RAY_DASHBOARD_STARTUP_TIMEOUT_S": "900",
        }
        owner = {"apiVersion": "ray.io/v1", "kind": "RayJob", "name": job["metadata"]["name"]}
        metadata = {
            "name": pod.name,
            "labels": template["metadata"]["labels"] | labels,
            "annotations": template["metadata"].get("annotations", {}),
            "ownerReferences": [owner | {"uid": job["metadata"]["uid"]}],
        }
        self.server.create(PODS, {"metadata": metadata, "spec": spec})

    def _dashboard(self, status: Object, path: str, *, post: bool = False) -> Object | None:
        """An answer of the dashboard of a cluster; None without one."""
        cluster = self._clusters.get(status.get("rayClusterName", ""))
        running = self.kubelet.running.get(cluster.head) if cluster is not None else None
        if cluster is None or running is None:
            return None
        command = ["curl", "-s", "-m", "5", "-H", f"Authorization: Bearer {cluster.token}"]
        command += ["-X", "POST"] if post else []
        done = running.machine.run(*command, f"{DASHBOARD}{path}", check=False)
        with contextlib.suppress(ValueError):
            answer: Object = json.loads(done.stdout)
            return answer
        return None

    def _collect(self) -> None:
        """Delete what belongs to RayJobs that are gone."""
        owned = [(path, entry["metadata"]) for path in _OWNED for entry in self.server.items(path)]
        # Asked after what is owned: a RayJob is created before it owns anything, so that all
        # owners that still exist are in this list.
        alive = {job["metadata"]["uid"] for job in self.server.items(JOBS)}
        for path, metadata in owned:
            owners = {owner["uid"] for owner in metadata.get("ownerReferences", [])}
            if owners and not owners & alive and "deletionTimestamp" not in metadata:
                self.server.delete(f"{path}/{metadata['name']}")


def _suffix() -> str:
    return secrets.token_hex(3)[:5]


def _failed(reason: str, message: str) -> Object:
    return {"jobDeploymentStatus": "Failed", "reason": reason, "message": message}


def _exit_code(pod: Object, container: str) -> int | None:
    """Of a container that has ended; else None."""
    for status in pod["status"].get("containerStatuses", []):
        if status["name"] == container and "terminated" in status["state"]:
            code: int = status["state"]["terminated"]["exitCode"]
            return code
    return None


def _age(text: str) -> float:
    """Seconds since a time of Kubernetes."""
    return time.time() - datetime.fromisoformat(text).timestamp()
