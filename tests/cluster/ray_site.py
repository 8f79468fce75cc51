"""Three machines with Ray, and a job with every stage: for scenarios of losses."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pipeline.layout import RunDir
from pipeline.orchestrate import preflight
from tests.cluster.fabric import Fabric
from tests.cluster.ray_machines import RayMachines
from tests.cluster.ray_runs import ClusterRun, PreparedJob

LATER_STAGES = """
  finetune:
    {from: pretrain, image_size: 32, epochs: 1, global_batch: 16, precision: fp32,
     base_lr: 1e-3, base_lr_batch: 16, intermediate_supervision: false,
     augment: {mixup: 0, cutmix: 0}}
  evaluate: {from: finetune}
  export: {from: finetune}
"""


@dataclass(frozen=True)
class WholeJob(PreparedJob):
    """A job with all five stages."""

    @property
    def text(self) -> str:
        return super().text.rstrip() + LATER_STAGES


class RaySite:
    """The machines n1 to n3; n1 is the head, and has the driver."""

    def __init__(self, fabric: Fabric, folder: Path) -> None:
        self.fabric = fabric
        self.ray = RayMachines(folder=folder)
        self.job = WholeJob(folder)

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
