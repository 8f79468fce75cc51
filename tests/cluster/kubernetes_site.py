"""A Kubernetes cluster of the tests: a real API server, stand-ins for what else a cluster has."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.cluster.api_server import NAMESPACE, ApiServer, Object, api_server, kuberay_definition
from tests.cluster.fabric import Fabric
from tests.cluster.kubelet_stand_in import PODS
from tests.cluster.kuberay_stand_in import JOBS, KubeRayStandIn

IMAGE = "registry.example/revcol-pipeline:1.0"
_CLAIMS = f"/api/v1/namespaces/{NAMESPACE}/persistentvolumeclaims"
CLUSTER = """
kind: kubernetes
nodes: {nodes}
devices_per_node: {devices}
device: cpu
threads: 1
loader_threads: 1
wait: 900
grace: 60
kubernetes:
  image: {image}
  cpus: 2
  memory: 4Gi
  claims: {{runs: {{name: runs, path: {claim}}}}}
"""


@dataclass(kw_only=True)
class KubernetesSite:
    """The cluster, and the folder that its claim for runs holds."""

    server: ApiServer
    operator: KubeRayStandIn
    claim: Path

    @property
    def environment(self) -> dict[str, str]:
        """Variables of the user's commands."""
        return {"KUBECONFIG": str(self.server.kubeconfig)}

    def cluster_file(self, folder: Path, *, nodes: int = 1, devices: int = 1) -> Path:
        """A cluster file of that size."""
        path = folder / f"kubernetes-{nodes}-{devices}.yaml"
        text = CLUSTER.format(nodes=nodes, devices=devices, image=IMAGE, claim=self.claim)
        path.write_text(text)
        return path

    def job(self, name: str) -> Object:
        """A RayJob."""
        return self.server.request("GET", f"{JOBS}/{name}")

    def deployment(self, name: str) -> str:
        """Its state, in KubeRay's word."""
        return str((self.job(name).get("status") or {}).get("jobDeploymentStatus", ""))

    def pods(self, role: str = "") -> list[str]:
        """Names of the pods: of the head, or of the workers, that are not being deleted."""
        return [
            pod["metadata"]["name"]
            for pod in self.server.items(PODS, f"ray.io/node-type={role}" if role else "")
            if "deletionTimestamp" not in pod["metadata"]
        ]

    def delete_pod(self, name: str, grace: int | None = None) -> None:
        """What `kubectl delete pod` does, or the drain of a node."""
        self.server.delete(f"{PODS}/{name}", grace)


@contextlib.contextmanager
def kubernetes_cluster(folder: Path) -> Iterator[KubernetesSite]:
    """A cluster whose pods are machines that see ``folder``."""
    claim = folder / "claim"
    claim.mkdir()
    with api_server(folder / "api") as server, Fabric(shared=[folder]) as fabric:
        server.define(kuberay_definition())
        request = {"accessModes": ["ReadWriteMany"], "resources": {"requests": {"storage": "1Gi"}}}
        server.create(_CLAIMS, {"metadata": {"name": "runs"}, "spec": request})
        operator = KubeRayStandIn(server, fabric, folder / "pods")
        try:
            yield KubernetesSite(server=server, operator=operator, claim=claim)
        finally:
            operator.close()
