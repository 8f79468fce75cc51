"""Renders what a run is on Kubernetes: a ConfigMap, a NetworkPolicy and a RayJob.

    ConfigMap      the job, and the arguments of the driver's command
    NetworkPolicy  only the run's own pods and KubeRay's operator connect with its pods
    RayJob         a head without GPUs, whose second container submits the driver, and the workers

All three have the name of the RayJob. They hold no secret: the operator makes the token of Ray.
The entry point passes through two shells, so it is constant and has no argument.
"""

from __future__ import annotations

import importlib.metadata
import json
import re
from pathlib import Path
from typing import Any

import yaml

from pipeline.cluster import kubernetes_pods as pods
from pipeline.cluster.code_package import code_digest
from pipeline.cluster.kubernetes_pods import JobNames, Manifest
from pipeline.cluster.launcher import Submission
from pipeline.config.schema import ClusterConfig
from pipeline.files import digest
from pipeline.layout import RunDir

GROUP = "ray.io"
ENTRY_POINT = "python -m pipeline.cluster.pod_driver"
ARGUMENTS = "arguments.json"  # in the ConfigMap, beside the job
JOB = "job.yaml"
QUEUE_LABEL = "kueue.x-k8s.io/queue-name"

_OPERATOR = {"app.kubernetes.io/name": "kuberay-operator"}  # as its Helm chart labels it
_DASHBOARD = 8265
_RETRIES = 3  # new clusters after the loss of the head
_TTL_S = 60  # how long the pods of a finished run stay, for the end of its output
_OBJECT_STORE = 200_000_000  # bytes; only results of preparation tasks pass through it
_LONGEST_SLUG = 28  # of the 47 characters that a RayJob's name may have


def names_of(submission: Submission) -> JobNames:
    """Names that are valid for Kubernetes, and that no other run directory has.

    Example: run "Größe 1" in /runs/a, second submission -> RayJob "gr-e-1-0f1e2d3c-2".
    """
    run = run_name(submission.name, submission.run_dir)
    return JobNames(f"{run}-{submission.attempt}", run)


def run_name(name: str, run_dir: Path) -> str:
    """The part of the names that all submissions of a run have in common."""
    slug = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    if not slug[:1].isalpha():
        slug = f"run-{slug}"
    return f"{slug[:_LONGEST_SLUG].strip('-')}-{digest(str(run_dir).encode())[:8]}"


def manifests(submission: Submission) -> list[Manifest]:
    """ConfigMap, NetworkPolicy and RayJob, in the order in which they are created."""
    names = names_of(submission)
    return [
        _config_map(submission, names),
        _network_policy(submission.cluster, names),
        _ray_job(submission.cluster, names),
    ]


def render(submission: Submission) -> str:
    """The manifests as YAML: the same for the same job."""
    return as_yaml(manifests(submission))


def as_yaml(objects: list[Manifest]) -> str:
    """Manifests as one YAML stream; texts of several lines stay readable."""
    text: str = yaml.dump_all(
        objects, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100
    )
    return text


def _metadata(cluster: ClusterConfig, names: JobNames) -> Manifest:
    metadata: Manifest = {"name": names.job}
    if cluster.kubernetes.namespace:
        metadata["namespace"] = cluster.kubernetes.namespace
    metadata["labels"] = pods.labels(cluster, names.run)
    return metadata


def _config_map(submission: Submission, names: JobNames) -> Manifest:
    run = RunDir(submission.run_dir)
    arguments = {
        "arguments": [submission.verb, f"{pods.JOB_FOLDER}/{JOB}", *submission.options],
        # The checks of `doctor` leave nothing in a run directory.
        "log": str(run.driver_log(names.job)) if submission.verb == "run" else "",
        "ray": importlib.metadata.version("ray"),
        "code": code_digest(),
    }
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": _metadata(submission.cluster, names),
        "data": {JOB: submission.job_text, ARGUMENTS: json.dumps(arguments, indent=2)},
    }


def _network_policy(cluster: ClusterConfig, names: JobNames) -> Manifest:
    own = {"matchLabels": {pods.RUN_LABEL: names.run}}
    # The operator may be in any namespace, and asks the head for the state of the driver.
    operator = {"namespaceSelector": {}, "podSelector": {"matchLabels": _OPERATOR}}
    return {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": _metadata(cluster, names),
        "spec": {
            "podSelector": own,
            "policyTypes": ["Ingress"],
            "ingress": [
                {"from": [{"podSelector": own}]},
                {"from": [operator], "ports": [{"protocol": "TCP", "port": _DASHBOARD}]},
            ],
        },
    }


def _ray_job(cluster: ClusterConfig, names: JobNames) -> Manifest:
    kubernetes = cluster.kubernetes
    metadata = _metadata(cluster, names)
    if kubernetes.queue:
        metadata["labels"][QUEUE_LABEL] = kubernetes.queue
    if kubernetes.annotations:
        metadata["annotations"] = dict(kubernetes.annotations)
    spec: Manifest = {
        # The submitter is part of the head's pod: its loss alone does not fail a run.
        "submissionMode": "SidecarMode",
        "entrypoint": ENTRY_POINT,
        "shutdownAfterJobFinishes": True,
        "ttlSecondsAfterFinished": _TTL_S,
        "backoffLimit": _RETRIES,
        "suspend": False,
        "rayClusterSpec": _ray_cluster(cluster, names),
    }
    # KubeRay calls a cluster running when all of its pods are. A run that may continue with fewer
    # machines would be ended in mid-training.
    if cluster.fewest_nodes == cluster.nodes:
        spec["preRunningDeadlineSeconds"] = cluster.wait
    return {"apiVersion": f"{GROUP}/v1", "kind": "RayJob", "metadata": metadata, "spec": spec}


def _ray_cluster(cluster: ClusterConfig, names: JobNames) -> Manifest:
    gpus = cluster.devices_per_node if cluster.device == "cuda" else 0
    # The operator asks the dashboard. Without CPUs, no process of a stage is placed on the head.
    head = {"dashboard-host": "0.0.0.0", "num-cpus": "0", "num-gpus": "0"}
    worker = {"num-cpus": str(cluster.kubernetes.cpus), "num-gpus": str(gpus)}
    common = {"object-store-memory": str(_OBJECT_STORE)}
    return {
        "rayVersion": importlib.metadata.version("ray"),
        # Without the name of a Secret, the operator makes the token itself.
        "authOptions": {"mode": "token"},
        "headGroupSpec": {"rayStartParams": head | common, "template": pods.head(cluster, names)},
        "workerGroupSpecs": [
            {
                "groupName": "workers",
                "replicas": cluster.nodes,
                "minReplicas": cluster.nodes,
                "maxReplicas": cluster.nodes,
                "rayStartParams": worker | common,
                "template": pods.worker(cluster, names),
            }
        ],
    }


class _Dumper(yaml.SafeDumper):  # type: ignore[misc]
    """Writes texts of several lines as blocks, and nothing twice by reference."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    style = "|" if "\n" in text else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _text)
