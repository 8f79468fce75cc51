"""The pods of a run on Kubernetes: volumes, variables, resources and what they may not do.

Pure functions of the cluster section; nothing is asked and nothing is sent.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.config.schema import ClusterConfig
from pipeline.config.schema.kubernetes import TolerationConfig
from pipeline.layout import RunDir
from pipeline.runtime import environment

Manifest = dict[str, Any]

APPLICATION = "revcol-pipeline"
RUN_LABEL = f"{APPLICATION}/run"  # on everything that belongs to a run, of all its submissions
JOB_FOLDER = "/run/pipeline-job"  # where the driver's pod sees the job
TENSORBOARD_PORT = 6006

_USER = 1000  # of docker/Dockerfile; a number, because the kubelet cannot verify a name
_TEMPORARY = "/tmp"
_MARGIN_S = 30  # beyond the grace: the end of the processes
_HEAD = {"cpu": "2", "memory": "8Gi"}  # driver and Ray's own servers; it trains nothing
_READER = {"cpu": "500m", "memory": "2Gi"}  # a short command, and TensorBoard


@dataclass(frozen=True)
class JobNames:
    """Names of one submission of a run. ``job``: of its RayJob; ``run``: value of RUN_LABEL."""

    job: str
    run: str


def labels(cluster: ClusterConfig, run: str) -> dict[str, str]:
    """Labels of everything that belongs to a run."""
    return {
        **cluster.kubernetes.labels,
        "app.kubernetes.io/name": APPLICATION,
        RUN_LABEL: run,
    }


def head(cluster: ClusterConfig, names: JobNames) -> Manifest:
    """Template of the pod with Ray's head and the driver."""
    pod = _ray_pod(cluster, names, container="ray-head", resources=_HEAD)
    pod["spec"]["volumes"].append({"name": "job", "configMap": {"name": names.job}})
    mounts = pod["spec"]["containers"][0]["volumeMounts"]
    mounts.append({"name": "job", "mountPath": JOB_FOLDER, "readOnly": True})
    return pod


def worker(cluster: ClusterConfig, names: JobNames) -> Manifest:
    """Template of the pods whose processes train."""
    kubernetes = cluster.kubernetes
    resources = {"cpu": str(kubernetes.cpus), "memory": str(kubernetes.memory)}
    if cluster.device == "cuda":
        resources[kubernetes.gpu_resource] = str(cluster.devices_per_node)
    return _ray_pod(cluster, names, container="ray-worker", resources=resources)


def reader(cluster: ClusterConfig, name: str, command: Sequence[str]) -> Manifest:
    """A pod that runs a short command with the volumes of a run."""
    spec = _pod_spec(cluster, "reader", _READER, {"HOME": _TEMPORARY})
    spec["containers"][0]["command"] = list(command)
    metadata = {"name": name, "labels": {"app.kubernetes.io/name": APPLICATION}}
    return {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": spec}


def tensorboard(cluster: ClusterConfig, name: str, run_dir: RunDir) -> list[Manifest]:
    """A Deployment and a Service that show the curves of a run."""
    selector = {"app.kubernetes.io/name": "tensorboard", RUN_LABEL: name}
    spec = _pod_spec(cluster, "tensorboard", _READER, {"HOME": _TEMPORARY})
    # The only policy that a Deployment may have.
    spec["restartPolicy"] = "Always"
    # On loopback: TensorBoard asks for no password. A port-forward ends inside of the pod.
    options = ["--logdir", str(run_dir.tensorboard()), "--host", "127.0.0.1"]
    options += ["--port", str(TENSORBOARD_PORT)]
    spec["containers"][0]["command"] = ["python", "-m", "tensorboard.main", *options]
    metadata = {"name": name, "labels": selector}
    port = {"name": "http", "port": TENSORBOARD_PORT, "targetPort": TENSORBOARD_PORT}
    return [
        {
            "apiVersion": "apps/v1",
            "kind": "Deployment",
            "metadata": metadata,
            "spec": {
                "replicas": 1,
                "selector": {"matchLabels": selector},
                "template": {"metadata": {"labels": selector}, "spec": spec},
            },
        },
        {
            "apiVersion": "v1",
            "kind": "Service",
            "metadata": metadata,
            "spec": {"selector": selector, "ports": [port]},
        },
    ]


def _ray_pod(
    cluster: ClusterConfig, names: JobNames, *, container: str, resources: Mapping[str, str]
) -> Manifest:
    variables = {
        # With these, a pod that is deleted leaves Ray first: the ranks save, then it ends.
        **environment.ray_node(cluster.grace),
        **environment.ray_job(cluster.grace),
        **environment.kubernetes_job(names.job),
        "HOME": _TEMPORARY,
        "PYTHONUNBUFFERED": "1",
    }
    spec = _pod_spec(cluster, container, resources, variables)
    spec["terminationGracePeriodSeconds"] = cluster.grace + _MARGIN_S
    if cluster.kubernetes.priority_class:
        spec["priorityClassName"] = cluster.kubernetes.priority_class
    metadata: Manifest = {"labels": labels(cluster, names.run)}
    if cluster.kubernetes.annotations:
        metadata["annotations"] = dict(cluster.kubernetes.annotations)
    return {"metadata": metadata, "spec": spec}


def _pod_spec(
    cluster: ClusterConfig,
    container: str,
    resources: Mapping[str, str],
    variables: Mapping[str, str],
) -> Manifest:
    """What all pods have in common: least rights, the claims, a place for temporary files."""
    kubernetes = cluster.kubernetes
    volumes, mounts = _volumes(cluster)
    entry: Manifest = {
        "name": container,
        "image": kubernetes.image,
        "imagePullPolicy": kubernetes.pull_policy,
        "env": [{"name": key, "value": value} for key, value in variables.items()],
        # Requests equal limits: a pod that gets what it asked for is evicted last.
        "resources": {"requests": dict(resources), "limits": dict(resources)},
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "capabilities": {"drop": ["ALL"]},
            "readOnlyRootFilesystem": True,
        },
        "volumeMounts": mounts,
    }
    if kubernetes.environment_from:
        secrets = kubernetes.environment_from
        entry["envFrom"] = [{"secretRef": {"name": secret}} for secret in secrets]
    spec: Manifest = {
        "restartPolicy": "Never",
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": _USER,
            "runAsGroup": _USER,
            "fsGroup": _USER,
            # Otherwise every start visits each file of the volumes.
            "fsGroupChangePolicy": "OnRootMismatch",
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "containers": [entry],
        "volumes": volumes,
    }
    if kubernetes.image_pull_secrets:
        spec["imagePullSecrets"] = [{"name": name} for name in kubernetes.image_pull_secrets]
    if kubernetes.node_selector:
        spec["nodeSelector"] = dict(kubernetes.node_selector)
    if kubernetes.tolerations:
        spec["tolerations"] = [_toleration(entry) for entry in kubernetes.tolerations]
    return spec


def _volumes(cluster: ClusterConfig) -> tuple[list[Manifest], list[Manifest]]:
    """(volumes, mounts). KubeRay adds a /dev/shm as large as the memory of the container."""
    volumes: list[Manifest] = [{"name": "temporary", "emptyDir": {}}]
    mounts: list[Manifest] = [{"name": "temporary", "mountPath": _TEMPORARY}]
    claims = cluster.kubernetes.claims
    for name, claim in (("runs", claims.runs), ("data", claims.data)):
        if claim is not None:
            source: Manifest = {"claimName": claim.name}
            mount: Manifest = {"name": name, "mountPath": claim.path}
            if name == "data":
                mount["readOnly"] = True
            volumes.append({"name": name, "persistentVolumeClaim": source})
            mounts.append(mount)
    if (cache := cluster.shard_cache) is not None:
        volumes.append({"name": "shards", "emptyDir": {"sizeLimit": f"{cache.max_gib:g}Gi"}})
        mounts.append({"name": "shards", "mountPath": cache.local_folder})
    return volumes, mounts


def _toleration(toleration: TolerationConfig) -> Manifest:
    """Without empty entries, which Kubernetes would take literally."""
    return {key: value for key, value in toleration.model_dump().items() if value}
