"""Checks of the cluster section: keys that contradict its kind, sizes, names of secrets."""

from __future__ import annotations

import re

from pipeline.config.checks.checker import Checker
from pipeline.config.checks.kubernetes import check_kubernetes
from pipeline.config.schema import ClusterConfig

LEAST_HANG_TIMEOUT = 5  # seconds
# Values of `network.environment` are written into scripts, manifests and logs.
_SECRET = re.compile(r"TOKEN|SECRET|PASSW|CREDENTIAL|PRIVATE|(API|ACCESS|AUTH)_?KEY", re.IGNORECASE)


def check_cluster(checker: Checker) -> None:
    """Report what contradicts itself in the cluster section."""
    cluster = checker.job.cluster
    if cluster.kind == "local":
        _check_one_machine(checker, cluster)
    else:
        _check_machines(checker, cluster)
    if cluster.fewest_nodes > cluster.nodes:
        cause = f"{cluster.min_nodes} is more than the {cluster.nodes} machines of `nodes`"
        checker.report("cluster.min_nodes", cause, f"take 1 to {cluster.nodes}")
    _check_timeouts(checker, cluster)
    for name in filter(_SECRET.search, cluster.network.environment):
        cause = f"{name} looks like a secret, and its value would be in scripts and logs"
        remedy = "let the program read a file that only you can read, and give its path"
        checker.report("cluster.network.environment", cause, remedy)
    for option in cluster.slurm.extra:
        if not re.fullmatch(r"--[a-z][a-z0-9-]*(=\S.*)?", option) or "\n" in option:
            cause = f"{option!r} is no option of sbatch"
            checker.report("cluster.slurm.extra", cause, "write each as --name=value")


def _check_timeouts(checker: Checker, cluster: ClusterConfig) -> None:
    """Whoever waits for others must wait longer than the search for a process that hangs takes."""
    if cluster.hang_timeout < LEAST_HANG_TIMEOUT:
        cause = "processes are asked for a sign of progress once per second"
        checker.report("cluster.hang_timeout", cause, f"take {LEAST_HANG_TIMEOUT} or more")
    if cluster.collective_timeout <= cluster.hang_timeout:
        cause = f"{cluster.collective_timeout} s are over before hang_timeout has found the cause"
        remedy = f"take more than {cluster.hang_timeout}"
        checker.report("cluster.collective_timeout", cause, remedy)


def _check_one_machine(checker: Checker, cluster: ClusterConfig) -> None:
    for key in ("nodes", "devices_per_node"):
        if getattr(cluster, key) != 1:
            cause = "kind local is one machine, with `processes` processes"
            checker.report(f"cluster.{key}", cause, "kind: ray, slurm or kubernetes (--on NAME)")


def _check_machines(checker: Checker, cluster: ClusterConfig) -> None:
    if cluster.processes != "auto":
        cause = f"kind {cluster.kind} has nodes x devices_per_node processes"
        checker.report("cluster.processes", cause, "write nodes and devices_per_node instead")
    if cluster.device == "auto":
        cause = "this machine does not know the devices of the others"
        checker.report("cluster.device", cause, "device: cuda, or cpu")
    if cluster.kind == "ray" and not cluster.ray.address:
        cause = "no cluster is named"
        checker.report("cluster.ray.address", cause, "address: http://HOST:8265")
    if cluster.kind == "kubernetes":
        check_kubernetes(checker)
