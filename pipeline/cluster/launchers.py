"""The launcher of each kind of cluster."""

from __future__ import annotations

from pipeline.cluster.launcher import Launcher
from pipeline.cluster.record import ClusterRecord
from pipeline.config.schema import ClusterConfig


def launcher_for(cluster: ClusterConfig) -> Launcher:
    """The launcher for a job's cluster section, whose kind is not local."""
    # Imported when needed: a run on this machine must not depend on any of them.
    if cluster.kind == "ray":
        from pipeline.cluster.ray_jobs import RayJobs

        return RayJobs(cluster.ray.address, cluster.ray.token_file)
    if cluster.kind == "slurm":
        from pipeline.cluster.slurm import Slurm

        return Slurm(cluster)
    if cluster.kind == "kubernetes":
        from pipeline.cluster.kubernetes_jobs import KubernetesJobs

        return KubernetesJobs(cluster)
    raise ValueError(f"a run of kind {cluster.kind} has no launcher")


def launcher_of(record: ClusterRecord) -> Launcher:
    """The launcher that a run was submitted with."""
    return launcher_for(record.config)
