"""The state of a RayJob in our words, and why it waits."""

from __future__ import annotations

from typing import Any

import pytest

from pipeline.cluster.kubernetes_checks import lost_fields
from pipeline.cluster.kubernetes_jobs import output_of_driver
from pipeline.cluster.kubernetes_state import RayJobView, reason_in, state_of
from pipeline.errors import Interrupted, StageError


def pod(role: str, phase: str = "Running", **metadata: Any) -> dict[str, Any]:
    labels = {"ray.io/node-type": role}
    return {"metadata": {"name": role, "labels": labels, **metadata}, "status": {"phase": phase}}


def view(
    deployment: str,
    *pods: dict[str, Any],
    exit_code: int | None = None,
    workload: dict[str, Any] | None = None,
    **status: Any,
) -> RayJobView:
    """A RayJob that needs one worker."""
    return RayJobView(
        job={
            "metadata": {"name": "a"},
            "spec": {"suspend": deployment in ("Suspending", "Suspended")},
            "status": {"jobDeploymentStatus": deployment, **status},
        },
        workload=workload,
        pods=pods,
        needed=1,
        exit_code=exit_code,
    )


@pytest.mark.parametrize(
    ("seen", "phase"),
    [
        (view(""), "pending"),
        (view("Initializing", pod("head")), "pending"),
        (view("Initializing", pod("head"), pod("worker", "Pending")), "pending"),
        # The driver works as soon as the machines that it needs are there.
        (view("Initializing", pod("head"), pod("worker"), pod("worker", "Pending")), "running"),
        (view("Running", pod("head"), pod("worker")), "running"),
        (view("Running", pod("head")), "running"),
        (view("Retrying", pod("head", deletionTimestamp="x"), pod("worker")), "pending"),
        (view("Suspending", pod("head")), "running"),
        (view("Suspended"), "ended"),
        (view("Complete", jobStatus="SUCCEEDED"), "ended"),
        (view("Failed"), "ended"),
    ],
)
def test_each_state_has_a_phase(seen: RayJobView, phase: str) -> None:
    assert state_of(seen, "").phase == phase


@pytest.mark.parametrize(
    ("seen", "code"),
    [
        (view("Complete", jobStatus="SUCCEEDED"), 0),
        (view("Complete", jobStatus="STOPPED", exit_code=2), 2),
        (view("Complete", jobStatus="STOPPED"), StageError.exit_code),  # its pods are gone
        # Interrupted, killed, or without its head too often: it can be resumed.
        (view("Failed", jobStatus="FAILED"), Interrupted.exit_code),
        (view("Suspended"), None),
    ],
)
def test_an_ended_job_has_the_exit_code_of_its_driver(seen: RayJobView, code: int | None) -> None:
    assert state_of(seen, "").exit_code == code


def test_a_lost_job_is_named_with_the_reason() -> None:
    seen = view("Failed", reason="AppFailed", message="Ray head pod\nnot found.", failed=4)
    state = state_of(seen, "")
    assert state.reason == "Failed, AppFailed: Ray head pod not found."
    assert state.attempts == 5


def workload(active: bool, message: str = "") -> dict[str, Any]:
    conditions = [{"type": "QuotaReserved", "status": "False", "message": message}]
    spec = {"active": active, "queueName": "team"}
    return {"spec": spec, "status": {"conditions": conditions if message else []}}


def test_a_job_in_a_queue_waits_until_the_user_stops_it() -> None:
    message = "couldn't assign flavors: insufficient quota"
    waits = state_of(view("Suspended", workload=workload(True, message)), "")
    assert (waits.phase, waits.reason) == ("pending", message)
    assert state_of(view("Suspended", workload=workload(True)), "").reason == "in the queue team"
    assert state_of(view("Suspended", workload=workload(False)), "").phase == "ended"
    # Preempted: its pods are leaving, and then it waits again.
    assert state_of(view("Suspending", workload=workload(True)), "").phase == "running"


def event(name: str, kind: str, reason: str, message: str, second: int) -> dict[str, Any]:
    time = f"2026-01-31T12:00:{second:02}Z"
    about = {"name": name}
    entry = {"involvedObject": about, "type": kind, "reason": reason, "message": message}
    return entry | {"lastTimestamp": time, "metadata": {"creationTimestamp": time}}


def test_the_newest_warning_explains_why_a_job_waits() -> None:
    events = [
        event("a", "Warning", "FailedToCreateHeadPod", "exceeded quota: small", 5),
        event("a-x", "Warning", "FailedScheduling", "0/3 nodes\nare available", 9),
    ]
    assert reason_in(events, None) == "FailedScheduling: 0/3 nodes are available"
    assert reason_in(events[:1], None) == "FailedToCreateHeadPod: exceeded quota: small"


def test_a_warning_that_is_over_explains_nothing() -> None:
    events = [
        event("p", "Warning", "FailedScheduling", "0/3 nodes are available", 1),
        event("p", "Normal", "Pulling", 'Pulling image "x:1"', 2),
    ]
    assert reason_in(events, None) == 'Pulling image "x:1"'
    assert reason_in([], None) == ""


def test_a_container_that_waits_explains_what_no_event_does() -> None:
    waiting = {"reason": "ImagePullBackOff", "message": 'Back-off pulling image "x:1"'}
    waits = pod("head", "Pending")
    waits["status"]["containerStatuses"] = [{"state": {"waiting": waiting}}]
    assert reason_in([], waits) == 'ImagePullBackOff: Back-off pulling image "x:1"'
    waits["status"]["containerStatuses"] = [{"state": {"waiting": {"reason": "PodInitializing"}}}]
    assert reason_in([], waits) == ""


LOG = (
    b"Waiting for Ray\nJob 'a-1' submitted successfully\n"
    b"attempt 2 of job a-1, byte 100 of its log\nresuming\n"
    b"the driver ended with exit code 0\n\n------\nJob 'a-1' succeeded\n------\n"
)


def test_the_output_of_the_driver_is_cut_out_of_the_submitter_log() -> None:
    output, start = output_of_driver(LOG)
    assert start == 100
    assert output.startswith(b"attempt 2 of job a-1")
    assert output.endswith(b"exit code 0\n")
    assert output_of_driver(LOG[:40]) == (b"", 0)
    # Machines keep only the end of a long log: a later mark tells where it belongs.
    rotated = b"half a line\nattempt 2 of job a-1, byte 2000 of its log\nmore\n"
    output, start = output_of_driver(rotated)
    assert (start, output.endswith(b"more\n")) == (2000, True)


def test_fields_that_did_not_come_back_are_named() -> None:
    sent = {"a": {"b": 1, "c": [{"d": {}}, {"e": "x"}]}, "f": False}
    assert lost_fields(sent, sent | {"added": 1}) == []
    kept = {"a": {"b": 1, "c": [{}, {"e": "x"}]}}
    assert lost_fields(sent, kept) == ["spec.a.c.d", "spec.f"]
