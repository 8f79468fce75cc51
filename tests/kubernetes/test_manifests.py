"""The manifests of a run: valid for KubeRay, least rights, nothing secret."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import jsonschema
import pytest
import yaml

from pipeline.cluster import kubernetes_manifests, kubernetes_pods
from pipeline.cluster.kubernetes_manifests import ENTRY_POINT
from pipeline.config.check_on_machine import check_on_machine
from pipeline.config.load import load_job
from pipeline.errors import ConfigError
from pipeline.layout import RunDir
from tests.config.jobs import SHIPPED
from tests.kubernetes.rendered import (
    Schema,
    broken_rules,
    load,
    manifests,
    pods,
    set_sources,
    strict_schema,
    submission,
)

RESTRICTED_POD = {"runAsNonRoot": True, "seccompProfile": {"type": "RuntimeDefault"}}
RESTRICTED_CONTAINER = {
    "allowPrivilegeEscalation": False,
    "capabilities": {"drop": ["ALL"]},
    "readOnlyRootFilesystem": True,
}


@pytest.fixture
def sources(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    set_sources(monkeypatch, tmp_path)


@pytest.mark.parametrize("nodes", [1, 8, 64])
@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
@pytest.mark.usefixtures("sources")
def test_every_shipped_job_is_rendered_or_refused_with_a_batch_that_fits(
    path: Path, nodes: int
) -> None:
    loaded = load_job(path, [f"cluster.nodes={nodes}"], on="kubernetes", submits=True)
    run = RunDir(Path("/runs") / loaded.job.name)
    try:
        loaded = check_on_machine(loaded, run)
    except ConfigError as error:
        assert re.search(rf"global_batch: .*\b{nodes * 8} processes", error.message)
        assert re.search(r"-> (take \d+|an even micro_batch)", error.message)
        return
    text = kubernetes_manifests.render(submission(loaded, loaded.job.name))
    objects = list(yaml.safe_load_all(text))
    assert [entry["kind"] for entry in objects] == ["ConfigMap", "NetworkPolicy", "RayJob"]
    assert not broken_rules(objects[2])
    (group,) = objects[2]["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    assert group["replicas"] == nodes
    limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
    assert limits["nvidia.com/gpu"] == "8"


def of_kuberay(test: Callable[..., None]) -> Callable[..., None]:
    """Marks a test that needs KubeRay's definition, beside the checkout."""
    return pytest.mark.usefixtures("shared")(pytest.mark.shared(test))


@of_kuberay
def test_a_job_with_every_key_has_only_known_fields(tmp_path: Path) -> None:
    settings = [
        "cluster.device=cuda",
        "cluster.shard_cache={local_folder: /scratch, max_gib: 500}",
        "cluster.kubernetes.namespace=vision",
        "cluster.kubernetes.image_pull_secrets=[registry]",
        "cluster.kubernetes.environment_from=[store]",
        "cluster.kubernetes.queue=team",
        "cluster.kubernetes.priority_class=high",
        "cluster.kubernetes.node_selector={zone: a}",
        "cluster.kubernetes.tolerations=[{key: nvidia.com/gpu, effect: NoSchedule}]",
        "cluster.kubernetes.labels={ray.io/scheduler-name: volcano}",
        "cluster.kubernetes.annotations={k8s.v1.cni.cncf.io/networks: rdma}",
    ]
    job = manifests(tmp_path, *settings)["RayJob"]
    jsonschema.Draft202012Validator(strict_schema()).validate(job)
    assert not broken_rules(job)


@of_kuberay
@pytest.mark.parametrize("change", ["unknown", "nested", "mode"])
def test_the_schema_refuses_what_the_server_would_drop(tmp_path: Path, change: str) -> None:
    job = manifests(tmp_path)["RayJob"]
    if change == "unknown":
        job["spec"]["entryPoint"] = "x"
    elif change == "nested":
        pod = job["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]
        pod["containers"][0]["securityContext"]["readOnlyRoot"] = True
    else:
        job["spec"]["submissionMode"] = "HttpMode"
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.Draft202012Validator(strict_schema()).validate(job)


def test_rules_of_the_operator_are_noticed_when_broken(tmp_path: Path) -> None:
    job = manifests(tmp_path)["RayJob"]
    job["spec"]["shutdownAfterJobFinishes"] = False
    job["spec"]["rayClusterSpec"]["rayVersion"] = "2.51.0"
    assert len(broken_rules(job)) == 2


def all_pods(folder: Path, *overrides: str) -> dict[str, Schema]:
    """Specifications of every pod that a run may have."""
    cluster = load(folder, *overrides).job.cluster
    reader = kubernetes_pods.reader(cluster, "call-1", ["true"])
    deployment, _ = kubernetes_pods.tensorboard(cluster, "t", RunDir(Path("/runs/a")))
    templates = pods(folder, *overrides)
    return {name: template["spec"] for name, template in templates.items()} | {
        "reader": reader["spec"],
        "tensorboard": deployment["spec"]["template"]["spec"],
    }


@pytest.mark.parametrize("name", ["head", "worker", "reader", "tensorboard"])
def test_pods_have_the_least_rights(tmp_path: Path, name: str) -> None:
    spec = all_pods(tmp_path)[name]
    assert spec["securityContext"].items() >= RESTRICTED_POD.items()
    assert isinstance(spec["securityContext"]["runAsUser"], int)
    assert spec["securityContext"]["runAsUser"] > 0
    assert spec["securityContext"]["fsGroupChangePolicy"] == "OnRootMismatch"
    assert spec["automountServiceAccountToken"] is False
    for key in ("hostNetwork", "hostPID", "hostIPC"):
        assert key not in spec
    for container in spec["containers"]:
        assert container["securityContext"] == RESTRICTED_CONTAINER
    kinds = {next(iter(volume.keys() - {"name"})) for volume in spec["volumes"]}
    assert kinds <= {"emptyDir", "persistentVolumeClaim", "configMap"}


def test_the_head_has_no_gpu_and_data_is_only_read(tmp_path: Path) -> None:
    rendered = pods(tmp_path, "cluster.device=cuda", "cluster.devices_per_node=4")
    limits = {
        name: pod["spec"]["containers"][0]["resources"]["limits"] for name, pod in rendered.items()
    }
    assert "nvidia.com/gpu" not in limits["head"]
    assert limits["worker"]["nvidia.com/gpu"] == "4"
    for pod in rendered.values():
        mounts = {entry["name"]: entry for entry in pod["spec"]["containers"][0]["volumeMounts"]}
        assert mounts["data"] == {"name": "data", "mountPath": "/data", "readOnly": True}
        assert mounts["runs"] == {"name": "runs", "mountPath": "/runs"}


def test_pods_have_the_time_and_the_variables_to_save_before_they_end(tmp_path: Path) -> None:
    for pod in pods(tmp_path, "cluster.grace=90").values():
        assert pod["spec"]["terminationGracePeriodSeconds"] > 90
        container = pod["spec"]["containers"][0]
        variables = {entry["name"]: entry["value"] for entry in container["env"]}
        assert variables["RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"] == "90"
        assert variables["RAY_JOB_STOP_WAIT_TIME_S"] == "90"
        assert variables["RAY_health_check_failure_threshold"] == "4"


def allowed(policy: Schema, sender: Mapping[str, str], receiver: Mapping[str, str]) -> set[int]:
    """Ports of the receiver that a pod of the sender's labels may connect with; 0: all.

    Of the selectors, those that this policy uses: labels, and every namespace.
    """

    def selects(selector: Schema, labels: Mapping[str, str]) -> bool:
        assert set(selector) <= {"matchLabels"}, "a selector of another kind"
        return selector.get("matchLabels", {}).items() <= labels.items()

    spec = policy["spec"]
    if not selects(spec["podSelector"], receiver):
        return {0}
    ports: set[int] = set()
    for rule in spec["ingress"]:
        for peer in rule["from"]:
            assert peer.get("namespaceSelector", {}) == {}
            if selects(peer["podSelector"], sender):
                ports |= {entry["port"] for entry in rule.get("ports", [{"port": 0}])}
    return ports


def test_only_own_pods_and_the_operator_reach_the_pods_of_a_run(tmp_path: Path) -> None:
    policy = manifests(tmp_path)["NetworkPolicy"]
    assert policy["spec"]["policyTypes"] == ["Ingress"]
    rendered = {name: pod["metadata"]["labels"] for name, pod in pods(tmp_path).items()}
    other_job = kubernetes_manifests.manifests(submission(load(tmp_path), "other"))[2]
    other = other_job["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["metadata"]["labels"]
    operator = {"app.kubernetes.io/name": "kuberay-operator", "pod-template-hash": "1"}
    for receiver in rendered.values():
        for sender in rendered.values():
            assert allowed(policy, sender, receiver) == {0}
        assert allowed(policy, operator, receiver) == {8265}
        assert allowed(policy, other, receiver) == set()
        assert allowed(policy, {"app.kubernetes.io/name": "revcol-pipeline"}, receiver) == set()
        assert allowed(policy, {}, receiver) == set()


def test_nothing_secret_is_rendered(tmp_path: Path) -> None:
    loaded = load(tmp_path, "cluster.kubernetes.environment_from=[store]")
    objects = kubernetes_manifests.manifests(submission(loaded))
    job = objects[2]
    assert "Secret" not in {entry["kind"] for entry in objects}
    # The operator makes the token of Ray; the entries of a Secret are taken by its name.
    assert job["spec"]["rayClusterSpec"]["authOptions"] == {"mode": "token"}
    for pod in pods(tmp_path, "cluster.kubernetes.environment_from=[store]").values():
        container = pod["spec"]["containers"][0]
        assert container["envFrom"] == [{"secretRef": {"name": "store"}}]
        assert all(set(entry) == {"name", "value"} for entry in container["env"])
    text = kubernetes_manifests.as_yaml(objects)
    assert not re.search(r"[0-9a-f]{40}", text)
    assert not re.search(r"(?i)password|bearer|private[_-]?key", text)


def test_the_entry_point_survives_every_shell() -> None:
    assert re.fullmatch(r"[A-Za-z0-9_./:= -]+", ENTRY_POINT)


@pytest.mark.parametrize("name", ["Größe 1; rm -rf x", "x" * 200, "1st", "---", "a_b.c", "UPPER"])
def test_every_name_of_a_run_becomes_a_valid_one(tmp_path: Path, name: str) -> None:
    described = replace(submission(load(tmp_path)), name=name, attempt=12)
    valid = kubernetes_manifests.names_of(described).job
    assert re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", valid)
    assert len(valid) <= 47


def test_runs_of_one_name_in_two_directories_have_two_names(tmp_path: Path) -> None:
    loaded = load(tmp_path)
    names = {kubernetes_manifests.names_of(submission(loaded, name)).job for name in ("a", "b")}
    assert len(names) == 2


def test_the_same_job_renders_the_same_text(tmp_path: Path) -> None:
    texts = {kubernetes_manifests.render(submission(load(tmp_path))) for _ in range(2)}
    assert len(texts) == 1


def test_queue_priority_and_free_labels_reach_the_objects_that_schedulers_read(
    tmp_path: Path,
) -> None:
    settings = (
        "cluster.kubernetes.queue=team",
        "cluster.kubernetes.priority_class=high",
        "cluster.kubernetes.labels={ray.io/scheduler-name: volcano}",
        "cluster.kubernetes.annotations={k8s.v1.cni.cncf.io/networks: rdma}",
        "cluster.kubernetes.node_selector={zone: a}",
        "cluster.kubernetes.tolerations=[{key: gpu, effect: NoSchedule}]",
    )
    job = manifests(tmp_path, *settings)["RayJob"]
    assert job["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "team"
    assert job["metadata"]["labels"]["ray.io/scheduler-name"] == "volcano"
    for pod in pods(tmp_path, *settings).values():
        assert pod["metadata"]["labels"]["ray.io/scheduler-name"] == "volcano"
        assert pod["metadata"]["annotations"] == {"k8s.v1.cni.cncf.io/networks": "rdma"}
        assert pod["spec"]["priorityClassName"] == "high"
        assert pod["spec"]["nodeSelector"] == {"zone": "a"}
        toleration = {"key": "gpu", "operator": "Exists", "effect": "NoSchedule"}
        assert pod["spec"]["tolerations"] == [toleration]


def test_a_run_that_may_continue_with_fewer_machines_has_no_deadline_for_all(
    tmp_path: Path,
) -> None:
    spec = manifests(tmp_path, "cluster.wait=600")["RayJob"]["spec"]
    assert spec["preRunningDeadlineSeconds"] == 600
    spec = manifests(tmp_path, "cluster.min_nodes=1")["RayJob"]["spec"]
    assert "preRunningDeadlineSeconds" not in spec


def test_a_cache_of_shards_gets_room_in_the_pods(tmp_path: Path) -> None:
    cache = "cluster.shard_cache={local_folder: /scratch, max_gib: 500}"
    for pod in pods(tmp_path, cache).values():
        volume = next(entry for entry in pod["spec"]["volumes"] if entry["name"] == "shards")
        assert volume["emptyDir"] == {"sizeLimit": "500Gi"}


def test_tensorboard_listens_on_loopback_of_its_pod(tmp_path: Path) -> None:
    cluster = load(tmp_path).job.cluster
    deployment, service = kubernetes_pods.tensorboard(cluster, "t", RunDir(Path("/runs/a")))
    (container,) = deployment["spec"]["template"]["spec"]["containers"]
    assert container["command"][-6:-2] == ["--logdir", "/runs/a/tensorboard", "--host", "127.0.0.1"]
    assert service["spec"]["selector"] == deployment["spec"]["selector"]["matchLabels"]
