"""Checks of the keys of kind kubernetes, as far as no cluster is asked."""

from __future__ import annotations

import re

from pipeline.config.checks.checker import Checker
from pipeline.config.schema.kubernetes import ClaimsConfig, KubernetesConfig

# registry.example:5000/group/name, then :tag, @digest, or both.
_IMAGE = re.compile(
    r"[a-z0-9][^\s:@]*(:\d+/[^\s:@]+)?(?P<tag>(:[\w][\w.-]*)?(@sha256:[0-9a-f]{64})?)"
)


def check_kubernetes(checker: Checker) -> None:
    """Report what is missing for pods, and paths that they do not see."""
    kubernetes = checker.job.cluster.kubernetes
    _check_image(checker, kubernetes.image)
    _check_size(checker, kubernetes)
    _check_paths(checker, kubernetes.claims)


def _check_image(checker: Checker, image: str) -> None:
    key = "cluster.kubernetes.image"
    match = _IMAGE.fullmatch(image)
    if not image:
        checker.report(key, "no image is named", "image: REGISTRY/NAME:TAG, see docker/Dockerfile")
    elif match is None:
        checker.report(key, f"{image!r} is no name of an image", "write REGISTRY/NAME:TAG")
    elif not match["tag"]:
        # Without a tag the machines pull whatever is the newest one when a pod starts there.
        cause = f"{image} has no tag, so two pods may run different images"
        checker.report(key, cause, f"name a version: {image}:TAG")


def _check_size(checker: Checker, kubernetes: KubernetesConfig) -> None:
    devices = checker.job.cluster.devices_per_node
    if kubernetes.cpus is None:
        cause = "the cores of a worker pod are not given"
        checker.report("cluster.kubernetes.cpus", cause, f"cpus: {devices} or more")
    elif kubernetes.cpus < devices:
        cause = f"{kubernetes.cpus} cores are less than one per process ({devices})"
        checker.report("cluster.kubernetes.cpus", cause, f"cpus: {devices} or more")
    if kubernetes.memory is None:
        cause = "the memory of a worker pod is not given"
        checker.report("cluster.kubernetes.memory", cause, "memory: 512Gi, or what a machine has")


def _check_paths(checker: Checker, claims: ClaimsConfig) -> None:
    """Pods see their claims and nothing else of this machine's paths."""
    if claims.runs is None:
        remedy = "claims: {runs: {name: NAME, path: /runs}}"
        checker.report("cluster.kubernetes.claims.runs", "no claim is named", remedy)
        return
    if claims.data is not None and claims.data.path == claims.runs.path:
        cause = f"both claims are mounted at {claims.runs.path}"
        checker.report("cluster.kubernetes.claims.data.path", cause, "choose another folder")
    folders = [claim.path for claim in (claims.runs, claims.data) if claim is not None]
    runs = checker.job.cluster.runs
    if runs and not _is_below(runs, [claims.runs.path]):
        cause = f"{runs} is not on the claim for runs ({claims.runs.path})"
        checker.report("cluster.runs", cause, "leave it out, or name a folder below that path")
    for name, dataset in checker.job.data.items():
        for key, place in (("root", dataset.root), ("prepared", dataset.prepared)):
            if place.startswith("/") and not _is_below(place, folders):
                cause = f"pods do not see {place}, only {' and '.join(folders)}"
                remedy = "name the path on a claim (cluster.kubernetes.claims), or a store (s3://)"
                checker.report(f"data.{name}.{key}", cause, remedy)


def _is_below(path: str, folders: list[str]) -> bool:
    return any(path == folder or path.startswith(f"{folder}/") for folder in folders)
