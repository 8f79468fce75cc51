"""What is submitted for jobs, and KubeRay's definition as a schema without unknown fields."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from pipeline.cluster import kubernetes_manifests
from pipeline.cluster.launcher import Submission
from pipeline.config.load import LoadedJob, load_job
from pipeline.layout import RunDir
from pipeline.orchestrate.submit import SubmitOptions, submission_of
from tests.cluster.api_server import kuberay_definition
from tests.config.jobs import JOB, describe_export, write

IMAGE = "registry.example/revcol-pipeline:1.0"
ON_CPU = ("cluster.nodes=2", "cluster.devices_per_node=1", "cluster.device=cpu")
SYNTHETIC = ("data.toy.root=", "data.toy.synthetic={}")
SUBMISSION_MODES = ["K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode"]
Schema = dict[str, Any]


def set_sources(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """Variables that the shipped jobs need: images on the claim for data, a model, the image."""
    for name in ("IMAGENET22K", "IMAGENET1K", "CIFAR10", "OWN_IMAGES"):
        monkeypatch.setenv(name, f"/data/{name.lower()}")
    (folder / "model").mkdir()
    monkeypatch.setenv("TRAINED_MODEL", str(describe_export(folder / "model")))
    monkeypatch.setenv("PIPELINE_IMAGE", IMAGE)


def load(folder: Path, *overrides: str) -> LoadedJob:
    """The small job on Kubernetes, on two CPU pods."""
    path = write(folder, JOB)
    image = f"cluster.kubernetes.image={IMAGE}"
    settings = [*SYNTHETIC, *ON_CPU, image, *overrides]
    return load_job(path, settings, on="kubernetes", submits=True)


def submission(loaded: LoadedJob, name: str = "small", attempt: int = 1) -> Submission:
    """Its submission as a run of that name."""
    return submission_of(loaded, RunDir(Path("/runs") / name), SubmitOptions(), attempt)


def manifests(folder: Path, *overrides: str) -> dict[str, Schema]:
    """By kind."""
    objects = kubernetes_manifests.manifests(submission(load(folder, *overrides)))
    return {entry["kind"]: entry for entry in objects}


def pods(folder: Path, *overrides: str) -> dict[str, Schema]:
    """The templates of the head's pod and of the workers'."""
    cluster = manifests(folder, *overrides)["RayJob"]["spec"]["rayClusterSpec"]
    (group,) = cluster["workerGroupSpecs"]
    return {"head": cluster["headGroupSpec"]["template"], "worker": group["template"]}


@functools.cache
def strict_schema() -> Schema:
    """The JSON Schema of a RayJob (v1), in which every field must be known."""
    versions = kuberay_definition()["spec"]["versions"]
    version = next(entry for entry in versions if entry["name"] == "v1")
    schema = _strict(version["schema"]["openAPIV3Schema"])
    # The definition leaves these to the operator and to the API server.
    schema["properties"]["spec"]["properties"]["submissionMode"] = {"enum": SUBMISSION_MODES}
    text = {"type": "object", "additionalProperties": {"type": "string"}}
    schema["properties"]["metadata"] = {
        "type": "object",
        "additionalProperties": False,
        "required": ["name"],
        "properties": {
            "name": {"type": "string", "maxLength": 47, "pattern": "^[a-z]([-a-z0-9]*[a-z0-9])?$"},
            "namespace": {"type": "string"},
            "labels": text,
            "annotations": text,
        },
    }
    return schema


def _strict(schema: Schema) -> Schema:
    """The rules of a structural schema, and no field beyond it."""
    if schema.get("x-kubernetes-int-or-string"):
        pattern = {"pattern": schema["pattern"]} if "pattern" in schema else {}
        return {"type": ["integer", "string"], **pattern}
    strict = {key: value for key, value in schema.items() if key not in ("allOf", "anyOf", "oneOf")}
    if "properties" in schema:
        strict["properties"] = {key: _strict(part) for key, part in schema["properties"].items()}
        if not schema.get("x-kubernetes-preserve-unknown-fields"):
            strict["additionalProperties"] = False
        # The server fills in defaults before it looks for what is required.
        with_default = {key for key, part in schema["properties"].items() if "default" in part}
        required = set(schema.get("required", [])) - with_default
        strict["required"] = sorted(required)
    elif isinstance(schema.get("additionalProperties"), dict):
        strict["additionalProperties"] = _strict(schema["additionalProperties"])
    if isinstance(schema.get("items"), dict):
        strict["items"] = _strict(schema["items"])
    return strict


def broken_rules(job: Schema) -> list[str]:
    """Rules of KubeRay 1.7 that only its operator checks, as far as such a job can break them."""
    spec = job["spec"]
    cluster = spec["rayClusterSpec"]
    groups: Sequence[Schema] = cluster["workerGroupSpecs"]
    head = cluster["headGroupSpec"]["template"]["spec"]
    sidecar = spec["submissionMode"] == "SidecarMode"
    version = tuple(map(int, cluster["rayVersion"].split(".")))
    rules = {
        "suspending needs shutdownAfterJobFinishes": spec.get("shutdownAfterJobFinishes") is True,
        "suspending excludes clusterSelector": "clusterSelector" not in spec,
        "a TTL is not negative": spec.get("ttlSecondsAfterFinished", 0) >= 0,
        "no submitter template with a sidecar": not (sidecar and "submitterPodTemplate" in spec),
        "no submitter settings with a sidecar": not (sidecar and "submitterConfig" in spec),
        "the head never restarts": not sidecar or head.get("restartPolicy", "Never") == "Never",
        "retries are not negative": spec.get("backoffLimit", 0) >= 0,
        "tokens need Ray 2.52": "authOptions" not in cluster or version >= (2, 52),
        "groups have both limits": all(
            group["minReplicas"] <= group["replicas"] <= group["maxReplicas"] for group in groups
        ),
        "deadlines are positive": spec.get("preRunningDeadlineSeconds", 1) > 0,
        "the agent's port is left alone": not list(_ports_of_agents(cluster)),
    }
    return [rule for rule, holds in rules.items() if not holds]


def _ports_of_agents(cluster: Schema) -> Iterator[str]:
    """KubeRay's probes ask this port."""
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        yield from (key for key in group["rayStartParams"] if key.startswith("dashboard-agent"))
