"""Three machines with Ray, and a small job: for scenarios of losses."""

from __future__ import annotations

from pathlib import Path

from pipeline.layout import RunDir
from pipeline.orchestrate import preflight
from tests.cluster.fabric import Fabric
from tests.cluster.ray_machines import RayMachines
from tests.cluster.ray_runs import ClusterRun, PreparedJob


class RaySite:
    """The machines n1 to n3; n1 is the head, and has the driver."""

    def __init__(self, fabric: Fabric, folder: Path) -> None:
        self.fabric = fabric
        self.ray = RayMachines(folder=folder)
        self.job = PreparedJob(folder)

    def repair(self, *without: str) -> None:
        """Bring back every machine that a scenario has taken away, and take away ``without``."""
        machines = self.fabric.machines
        for name, node in self.ray.nodes.items():
            if name in machines and node.poll() is not None:
                machines[name].kill()
        if "n1" not in machines:
            for machine in list(machines.values()):
                machine.kill()
            self.ray.head(self.fabric.up("n1"), "--cpus", "2")
        for name in ("n2", "n3"):
            if name in without and name in machines:
                machines[name].kill()
            elif name not in without and name not in machines:
                self.ray.join(self.fabric.up(name), "--cpus", "2")

    def start(
        self,
        run_dir: RunDir,
        *arguments: str,
        job: Path | None = None,
        checks: bool = False,
        **size: int,
    ) -> ClusterRun:
        """Start the driver as a job of Ray would; ``checks`` before the first stage take time."""
        return ClusterRun.start(
            self.fabric["n1"],
            self.ray,
            job or self.job.on_cluster(**size),
            run_dir,
            *arguments,
            environment={} if checks else {preflight.OFF: "1"},
        )
