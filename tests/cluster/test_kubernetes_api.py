"""What a real API server says: every shipped job is kept whole, bad input is refused in words.

Nothing runs: there is no operator here.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pipeline.cluster import kubernetes_manifests
from pipeline.cluster.kubernetes_client import ApiAnswer, KubernetesApi
from pipeline.cluster.kubernetes_jobs import KubernetesJobs
from pipeline.config.check_on_machine import check_on_machine
from pipeline.config.load import load_job
from pipeline.errors import ConfigError
from pipeline.layout import RunDir
from tests.cluster.api_server import (
    NAMESPACE,
    ApiServer,
    Object,
    api_server,
    kuberay_definition,
)
from tests.cluster.processes import wait_until
from tests.config.jobs import SHIPPED
from tests.kubernetes.rendered import load, set_sources, submission

pytestmark = pytest.mark.shared  # KubeRay's definition
JOBS = f"/apis/ray.io/v1/namespaces/{NAMESPACE}/rayjobs"
CLAIMS = f"/api/v1/namespaces/{NAMESPACE}/persistentvolumeclaims"
DEFINITIONS = "/apis/apiextensions.k8s.io/v1/customresourcedefinitions"
KUEUE = f"/apis/kueue.x-k8s.io/v1beta1/namespaces/{NAMESPACE}"


@pytest.fixture(scope="module")
def bare(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ApiServer]:
    """A server without KubeRay."""
    with api_server(tmp_path_factory.mktemp("cluster") / "api") as server:
        yield server


@pytest.fixture(scope="module")
def refusals(bare: ApiServer, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The messages without KubeRay, and with one that is too old; then it is up to date.

    The order is that of a cluster's life, so one server is enough.
    """
    folder = tmp_path_factory.mktemp("job")
    messages: dict[str, str] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KUBECONFIG", str(bare.kubeconfig))
        messages["none"] = _refusal(folder)
        bare.define(_old_definition())
        messages["old"] = _refusal(folder)
        bare.request("DELETE", f"{DEFINITIONS}/rayjobs.ray.io")
        _wait_for_no_definition(bare)
        bare.define(kuberay_definition())
    return messages


def _wait_for_no_definition(server: ApiServer) -> None:
    path = f"{DEFINITIONS}/rayjobs.ray.io"
    wait_until(lambda: server.get(path) is None, "the end of the definition", 300, poll_s=0.2)


@pytest.fixture
def server(
    bare: ApiServer, refusals: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> Iterator[ApiServer]:
    """A server with KubeRay, the claims, and the user's account in this process."""
    monkeypatch.setenv("KUBECONFIG", str(bare.kubeconfig))
    request = {"accessModes": ["ReadWriteMany"], "resources": {"requests": {"storage": "1Gi"}}}
    for name in ("runs", "data"):
        bare.create(CLAIMS, {"metadata": {"name": name}, "spec": request})
    yield bare
    for path in (JOBS, CLAIMS):
        for entry in bare.items(path):
            name = entry["metadata"]["name"]
            bare.patch(f"{path}/{name}", {"metadata": {"finalizers": None}})
            bare.delete(f"{path}/{name}", grace=0)


def _old_definition() -> Object:
    """KubeRay's definition, without two fields that later releases brought."""
    definition = copy.deepcopy(kuberay_definition())
    for version in definition["spec"]["versions"]:
        spec = version["schema"]["openAPIV3Schema"]["properties"]["spec"]["properties"]
        spec.pop("preRunningDeadlineSeconds", None)
        spec["rayClusterSpec"]["properties"].pop("authOptions", None)
    return definition


def _refusal(folder: Path, *overrides: str) -> str:
    """The message with which a job is refused before anything is created."""
    loaded = load(folder, *overrides)
    with pytest.raises(ConfigError) as error:
        KubernetesJobs(loaded.job.cluster).check(submission(loaded))
    assert error.value.exit_code == 2
    return error.value.message


def contains(kept: Any, sent: Any) -> bool:
    """True if everything that was sent came back; the server may have added to it."""
    if isinstance(sent, dict):
        return isinstance(kept, dict) and all(contains(kept.get(key), sent[key]) for key in sent)
    if isinstance(sent, list):
        pairs = zip(kept, sent, strict=False)
        return (
            isinstance(kept, list) and len(kept) == len(sent) and all(contains(*p) for p in pairs)
        )
    return bool(kept == sent)


@pytest.fixture
def sources(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    set_sources(monkeypatch, tmp_path)


@pytest.mark.usefixtures("sources")
@pytest.mark.parametrize("nodes", [1, 8, 64])
def test_every_shipped_job_comes_back_as_it_was_sent(server: ApiServer, nodes: int) -> None:
    created = 0
    for path in SHIPPED:
        loaded = load_job(path, [f"cluster.nodes={nodes}"], on="kubernetes", submits=True)
        run = RunDir(Path("/runs") / loaded.job.name)
        try:
            loaded = check_on_machine(loaded, run)
        except ConfigError as error:
            assert f"{nodes * 8} processes" in error.message
            assert "\n  -> " in error.message
            continue
        described = submission(loaded, loaded.job.name)
        launcher = KubernetesJobs(loaded.job.cluster)
        launcher.check(described)
        name = launcher.submit(described)
        for sent in kubernetes_manifests.manifests(described):
            api = KubernetesApi()
            kept = api.get(sent["kind"], name) if sent["kind"] == "RayJob" else None
            if kept is None:  # the user's account may not read the others
                paths = {
                    "ConfigMap": f"/api/v1/namespaces/{NAMESPACE}/configmaps",
                    "NetworkPolicy": f"/apis/networking.k8s.io/v1/namespaces/{NAMESPACE}"
                    "/networkpolicies",
                }
                kept = server.get(f"{paths[sent['kind']]}/{name}")
            assert contains(kept, sent), sent["kind"]
        created += 1
    assert created >= (len(SHIPPED) if nodes == 1 else 5)


@pytest.mark.parametrize(
    "path",
    [
        f"/api/v1/namespaces/{NAMESPACE}/secrets",
        f"/api/v1/namespaces/{NAMESPACE}/configmaps",
        "/apis/ray.io/v1/namespaces/default/rayjobs",
        "/api/v1/nodes",
    ],
)
def test_the_shipped_role_allows_nothing_else(server: ApiServer, path: str) -> None:
    with pytest.raises(ApiAnswer) as answer:
        KubernetesApi()._request("GET", path)
    assert answer.value.is_forbidden


def test_a_job_leaves_nothing_if_its_rayjob_is_refused(server: ApiServer, tmp_path: Path) -> None:
    loaded = load(tmp_path, "cluster.kubernetes.labels={a/b/c: x}")
    with pytest.raises(ConfigError, match="the cluster refuses the RayJob"):
        KubernetesJobs(loaded.job.cluster).submit(submission(loaded))
    assert not server.items(JOBS)
    names = [
        entry["metadata"]["name"]
        for entry in server.items(f"/api/v1/namespaces/{NAMESPACE}/configmaps")
    ]
    assert not [name for name in names if name.startswith("small-")]


def test_a_second_submission_of_a_run_under_way_is_refused(
    server: ApiServer, tmp_path: Path
) -> None:
    loaded = load(tmp_path)
    launcher = KubernetesJobs(loaded.job.cluster)
    name = launcher.submit(submission(loaded))
    with pytest.raises(ConfigError, match=f"the RayJob {name} is working on this run"):
        launcher.submit(submission(loaded, attempt=2))
    # Once it has ended, the next submission takes its place.
    server.patch(f"{JOBS}/{name}/status", {"status": {"jobDeploymentStatus": "Suspended"}})
    server.patch(f"{JOBS}/{name}", {"spec": {"suspend": True}})
    second = launcher.submit(submission(loaded, attempt=2))
    assert [entry["metadata"]["name"] for entry in server.items(JOBS)] == [second]


def test_a_cluster_without_kuberay_or_with_an_old_one_is_named(refusals: dict[str, str]) -> None:
    assert "the cluster does not know RayJobs" in refusals["none"]
    assert "have KubeRay 1.7 or later installed" in refusals["none"]
    assert "its KubeRay is too old: it does not know spec." in refusals["old"]
    assert "preRunningDeadlineSeconds" in refusals["old"]
    assert "authOptions" in refusals["old"]


@pytest.mark.usefixtures("server")
@pytest.mark.parametrize(
    ("overrides", "cause", "remedy"),
    [
        (
            ["cluster.kubernetes.context=elsewhere"],
            "cluster.kubernetes.context: there is no context elsewhere",
            "kubectl config get-contexts",
        ),
        (
            ["cluster.kubernetes.claims.runs={name: nowhere, path: /runs}"],
            "cluster.kubernetes.claims.runs.name: the cluster has no PersistentVolumeClaim nowhere",
            "kubectl get persistentvolumeclaim",
        ),
        (
            ["cluster.kubernetes.queue=team"],
            "cluster.kubernetes.queue: the cluster has no LocalQueue team",
            "kubectl get localqueue",
        ),
        (
            ["cluster.kubernetes.namespace=default"],
            'cannot create resource "rayjobs"',
            "configs/kubernetes/launcher_role.yaml",
        ),
    ],
)
def test_what_the_cluster_does_not_have_is_refused(
    tmp_path: Path, overrides: list[str], cause: str, remedy: str
) -> None:
    message = _refusal(tmp_path, *overrides)
    assert cause in message
    assert remedy in message


def test_a_priority_class_is_looked_for_where_it_may_be_read(
    server: ApiServer, tmp_path: Path
) -> None:
    loaded = load(tmp_path, "cluster.kubernetes.priority_class=high")
    KubernetesJobs(loaded.job.cluster).check(submission(loaded))  # it may not: no refusal
    rule = {"apiGroups": ["scheduling.k8s.io"], "resources": ["priorityclasses"], "verbs": ["get"]}
    name = "priority-reader"
    server.grant({"kind": "ClusterRole", "metadata": {"name": name}, "rules": [rule]})
    message = _refusal(tmp_path, "cluster.kubernetes.priority_class=high")
    assert "the cluster has no PriorityClass high" in message


def test_no_kubeconfig_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "none"))
    message = _refusal(tmp_path)
    assert message.startswith("cluster.kubernetes.context: ")
    assert "KUBECONFIG" in message


def test_a_server_that_does_not_answer_is_named(
    server: ApiServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = server.kubeconfig.read_text().replace(f":{server.port}", ":9")
    (tmp_path / "kubeconfig").write_text(text)
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "kubeconfig"))
    message = _refusal(tmp_path)
    assert message.startswith("https://127.0.0.1:9: does not answer")
    text = server.kubeconfig.read_text().replace(server.tokens["launcher"], "wrong")
    (tmp_path / "kubeconfig").write_text(text)
    assert "refuses the credentials" in _refusal(tmp_path)


def test_a_job_in_a_queue_is_stopped_through_its_workload(
    server: ApiServer, tmp_path: Path
) -> None:
    """With the objects of Kueue, and what Kueue itself would write."""
    for kind in ("LocalQueue", "Workload"):
        server.define(_free_definition(kind))
    server.create(f"{KUEUE}/localqueues", _object("LocalQueue", "team"))
    loaded = load(tmp_path, "cluster.kubernetes.queue=team")
    launcher = KubernetesJobs(loaded.job.cluster)
    launcher.check(submission(loaded))
    name = launcher.submit(submission(loaded))
    job = server.request("GET", f"{JOBS}/{name}")
    server.patch(f"{JOBS}/{name}", {"spec": {"suspend": True}})
    workload = _object("Workload", f"rayjob-{name}")
    workload["metadata"]["labels"] = {"kueue.x-k8s.io/job-uid": job["metadata"]["uid"]}
    message = "couldn't assign flavors to pod set workers: insufficient quota for nvidia.com/gpu"
    workload["spec"] = {"active": True, "queueName": "team"}
    condition = {"type": "QuotaReserved", "status": "False", "message": message}
    workload["status"] = {"conditions": [condition]}
    server.create(f"{KUEUE}/workloads", workload)
    server.patch(f"{JOBS}/{name}/status", {"status": {"jobDeploymentStatus": "Suspended"}})
    waits = launcher.state(name)
    assert (waits.phase, waits.reason) == ("pending", message)
    launcher.stop(name, now=False)
    kept = server.request("GET", f"{KUEUE}/workloads/rayjob-{name}")
    assert kept["spec"]["active"] is False
    assert launcher.state(name).phase == "ended"


def _free_definition(kind: str) -> Object:
    plural = f"{kind.lower()}s"
    anything = {"type": "object", "x-kubernetes-preserve-unknown-fields": True}
    version = {"name": "v1beta1", "served": True, "storage": True}
    return {
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {
            "name": f"{plural}.kueue.x-k8s.io",
            # The server keeps this group of names for approved definitions.
            "annotations": {"api-approved.kubernetes.io": "unapproved, a test"},
        },
        "spec": {
            "group": "kueue.x-k8s.io",
            "scope": "Namespaced",
            "names": {"kind": kind, "plural": plural, "singular": kind.lower()},
            "versions": [version | {"schema": {"openAPIV3Schema": anything}}],
        },
    }


def _object(kind: str, name: str) -> Object:
    return {"apiVersion": "kueue.x-k8s.io/v1beta1", "kind": kind, "metadata": {"name": name}}
