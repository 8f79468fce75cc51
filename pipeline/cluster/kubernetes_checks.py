"""Asks a Kubernetes cluster whether it would accept a job. Nothing is created."""

from __future__ import annotations

import secrets

from pipeline.cluster import kubernetes_manifests
from pipeline.cluster.kubernetes_client import ApiAnswer, KubernetesApi
from pipeline.cluster.launcher import Submission
from pipeline.config.schema import ClusterConfig
from pipeline.errors import ConfigError

_SHOWN = 3  # fields in an error
_KUBERAY = "have KubeRay 1.7 or later installed, with its CustomResourceDefinitions"


def check(api: KubernetesApi, submission: Submission) -> None:
    """Have the server check the RayJob without keeping it, and look for what it names.

    Raises:
        ConfigError: no KubeRay or an older one, or a claim, queue or priority class that does not
            exist.
        ApiAnswer: the server refuses the RayJob.
    """
    job = kubernetes_manifests.manifests(submission)[-1]
    # The name may be taken. Of an object that is not kept, it does not matter.
    name = f"check-{secrets.token_hex(4)}"
    sent = job | {"metadata": job["metadata"] | {"name": name}}
    try:
        kept = api.create(sent, dry_run=True)
    except ApiAnswer as answer:
        if not answer.is_missing:
            raise
        raise _refusal(api, answer) from None
    # Servers drop unknown fields in silence.
    if lost := lost_fields(sent["spec"], kept["spec"]):
        raise ConfigError(
            f"its KubeRay is too old: it does not know {', '.join(lost[:_SHOWN])}",
            place=api.server,
            remedy=_KUBERAY,
        )
    _check_names(api, submission.cluster)


def _refusal(api: KubernetesApi, answer: ApiAnswer) -> ConfigError:
    """Not found: the namespace, or the kind RayJob."""
    if "namespaces" in answer.cause:
        return ConfigError(
            answer.cause,
            place="cluster.kubernetes.namespace",
            remedy="`kubectl get namespaces` lists them",
        )
    return ConfigError(
        "the cluster does not know RayJobs",
        place=api.server,
        remedy=f"{_KUBERAY}, or name another cluster with cluster.kubernetes.context",
    )


def _check_names(api: KubernetesApi, cluster: ClusterConfig) -> None:
    """Look for everything that must exist, where this account may read it."""
    kubernetes = cluster.kubernetes
    claims = kubernetes.claims
    named = {
        "claims.runs.name": ("PersistentVolumeClaim", claims.runs.name if claims.runs else ""),
        "claims.data.name": ("PersistentVolumeClaim", claims.data.name if claims.data else ""),
        "queue": ("LocalQueue", kubernetes.queue),
        "priority_class": ("PriorityClass", kubernetes.priority_class),
    }
    for key, (kind, name) in named.items():
        if not name:
            continue
        try:
            exists = api.get(kind, name) is not None
        except ApiAnswer as answer:
            if answer.is_forbidden:
                continue
            raise
        if not exists:
            raise ConfigError(
                f"the cluster has no {kind} {name}",
                place=f"cluster.kubernetes.{key}",
                remedy=f"`kubectl get {kind.lower()}` lists them; the administrator creates them",
            )


def lost_fields(sent: object, kept: object, above: str = "spec") -> list[str]:
    """The fields that were sent and did not come back: the server does not know them."""
    if isinstance(sent, dict):
        if not isinstance(kept, dict):
            return [above]
        lost = [lost_fields(value, kept.get(key), f"{above}.{key}") for key, value in sent.items()]
        return [field for fields in lost for field in fields]
    if isinstance(sent, list):
        if not isinstance(kept, list) or len(kept) != len(sent):
            return [above]
        lost = [lost_fields(*pair, above) for pair in zip(sent, kept, strict=True)]
        return [field for fields in lost for field in fields]
    return [] if sent is None or kept is not None else [above]
