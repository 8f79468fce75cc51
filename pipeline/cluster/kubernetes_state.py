"""The state of a RayJob in our words, from what the API server knows. Asks nothing.

    RayJob                          state
    --------------------------------------------------------------------------------------
    new, Initializing, Retrying     pending, until as many pods run as the run needs
    Running, Suspending             running
    Suspended                       ended: stopped; with a queue: pending while the queue may
                                    start it
    Complete                        ended: 0, or of a driver that failed, its exit code
    Failed                          ended: lost too often, interrupted, or never started

KubeRay reads the end of its submitter container, whose exit code is 1 for every failure. So
``pod_driver`` writes the driver's exit code as the last line of its output.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

from pipeline.cluster.kubernetes_pods import Manifest
from pipeline.cluster.launcher import JobState
from pipeline.errors import Interrupted, StageError

SUBMITTER = "ray-job-submitter"  # container of the head's pod, as KubeRay calls it
_GROUP_LABEL = "ray.io/node-type"  # "head" or "worker", set by KubeRay
_STARTING = ("", "Initializing", "Waiting", "Retrying")
_ACTIVE = ("Running", "Suspending")
_GENERIC = ("ContainerCreating", "PodInitializing")  # reasons that say nothing
_LONGEST = 300  # characters of a message; Ray's may hold the end of a log


@dataclass(frozen=True, kw_only=True)
class RayJobView:
    """A RayJob with what belongs to it.

    Attributes:
        workload: of Kueue; None without a queue, or before Kueue has seen the job.
        pods: of the present Ray cluster.
        needed: worker pods without which the driver waits.
        exit_code: that the driver has written; None if it has not.
    """

    job: Manifest
    workload: Manifest | None
    pods: Sequence[Manifest]
    needed: int
    exit_code: int | None = None

    @property
    def status(self) -> Manifest:
        return dict(self.job.get("status") or {})

    @property
    def deployment(self) -> str:
        """KubeRay's word: "Initializing", "Running", ...; "" for a new job."""
        return str(self.status.get("jobDeploymentStatus", ""))

    @property
    def head(self) -> Manifest | None:
        """The pod of the head."""
        return next((pod for pod in self.pods if _role(pod) == "head"), None)

    @property
    def is_starting(self) -> bool:
        """True until as many pods run as the driver needs."""
        if self.deployment not in _STARTING:
            return False
        # The driver starts with the head's pod, before KubeRay calls the whole cluster ready.
        running = [_role(pod) for pod in self.pods if _runs(pod)]
        return running.count("head") < 1 or running.count("worker") < self.needed

    @property
    def waits_in_queue(self) -> bool:
        """True if Kueue keeps the job suspended, and may start it."""
        if self.workload is None or not self.job["spec"].get("suspend"):
            return False
        return bool(self.workload["spec"].get("active", True))

    @property
    def stuck_pod(self) -> Manifest | None:
        """A pod that does not run yet: the head's, or else a worker's."""
        waiting = [pod for pod in self.pods if not _runs(pod)]
        return min(waiting, key=lambda pod: _role(pod) != "head", default=None)


def state_of(view: RayJobView, reason: str) -> JobState:
    """The state of a job.

    Args:
        reason: why its pods do not run, in the words of the cluster's events.
    """
    status = view.status
    started, ended = (_seconds(status.get(key)) for key in ("startTime", "endTime"))
    attempts = int(status.get("failed") or 0) + 1
    if view.waits_in_queue and view.deployment not in _ACTIVE:
        return JobState(phase="pending", reason=_of_workload(view), attempts=attempts)
    if view.is_starting:
        return JobState(phase="pending", reason=reason, attempts=attempts)
    if view.deployment in (*_STARTING, *_ACTIVE):
        return JobState(phase="running", started=started, attempts=attempts)
    return JobState(
        phase="ended",
        reason=_word(view, reason),
        started=started,
        ended=ended,
        exit_code=_exit_code(view),
        attempts=attempts,
    )


def reason_in(events: Sequence[Manifest], pod: Manifest | None) -> str:
    """Why a job waits: its newest event that is a warning, else what its pod waits for.

    Example: "FailedScheduling: 0/5 nodes are available: 5 Insufficient nvidia.com/gpu."
    """
    newest: dict[str, Manifest] = {}
    for event in sorted(events, key=_time_of):
        newest[str(event["involvedObject"].get("name"))] = event
    # A warning of an object that has a newer event is over: FailedScheduling, then Scheduled.
    warnings = [event for event in newest.values() if event.get("type") == "Warning"]
    if warnings:
        event = max(warnings, key=_time_of)
        return f"{event.get('reason')}: {_one_line(event.get('message'))}"
    for status in _container_statuses(pod):
        waiting = status.get("state", {}).get("waiting", {})
        if waiting.get("reason", "ContainerCreating") not in _GENERIC:
            return f"{waiting['reason']}: {_one_line(waiting.get('message'))}".rstrip(": ")
    ordinary = max(newest.values(), key=_time_of, default=None)
    return _one_line(ordinary.get("message")) if ordinary is not None else ""


def _exit_code(view: RayJobView) -> int | None:
    """The driver's exit code; None if it was stopped from outside."""
    # A suspended job has no driver any more, and nobody asked for its code in time.
    if view.deployment == "Suspended":
        return None
    if view.status.get("jobStatus") == "SUCCEEDED":
        return 0
    # Only a driver that failed for good has its Ray job stopped. All others can be resumed.
    if view.status.get("jobStatus") != "STOPPED":
        return Interrupted.exit_code
    return view.exit_code or StageError.exit_code  # the pods may be gone already


def _word(view: RayJobView, reason: str) -> str:
    """Why a job ended, with KubeRay's own words where it has some."""
    message = _one_line(view.status.get("message"))
    parts = [view.deployment, str(view.status.get("reason") or "")]
    word = ", ".join(part for part in parts if part)
    if view.deployment != "Failed":
        return word
    return ": ".join(part for part in (word, reason or message) if part)


def _of_workload(view: RayJobView) -> str:
    """What Kueue says about a job that waits."""
    assert view.workload is not None
    conditions = view.workload.get("status", {}).get("conditions", [])
    waiting = [entry for entry in conditions if entry.get("status") == "False"]
    message = _one_line(waiting[-1].get("message")) if waiting else ""
    queue = view.workload["spec"].get("queueName", "")
    return message or f"in the queue {queue}"


def _role(pod: Manifest) -> str:
    return str(pod["metadata"].get("labels", {}).get(_GROUP_LABEL, "worker"))


def _runs(pod: Manifest) -> bool:
    is_leaving = "deletionTimestamp" in pod["metadata"]
    return pod.get("status", {}).get("phase") == "Running" and not is_leaving


def _container_statuses(pod: Manifest | None) -> list[Manifest]:
    status = (pod or {}).get("status", {})
    return [*status.get("initContainerStatuses", []), *status.get("containerStatuses", [])]


def _time_of(event: Manifest) -> str:
    """When an event happened last; ISO texts of one zone sort as times do."""
    times = (event.get("lastTimestamp"), event.get("eventTime"), event.get("firstTimestamp"))
    return str(next((time for time in times if time), event["metadata"]["creationTimestamp"]))


def _seconds(text: str | None) -> float | None:
    """A time of Kubernetes ("2026-01-31T12:00:00Z") in seconds since 1970."""
    return datetime.fromisoformat(text).timestamp() if text else None


def _one_line(text: object) -> str:
    return " ".join(str(text or "").split())[:_LONGEST]
