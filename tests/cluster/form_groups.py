"""Forms groups of four processes on two machines, one after the other, and prints their ranks.

python -m tests.cluster.form_groups RUN_DIR COUNT
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from pipeline.layout import RunDir
from pipeline.orchestrate.joined_ray import ADDRESS, joined_ray
from pipeline.orchestrate.machines import alive_machines
from pipeline.orchestrate.placement import Placement
from pipeline.orchestrate.worker_group import worker_group


def main(folder: Path, count: int) -> None:
    """Form the groups."""
    with joined_ray(os.environ[ADDRESS]) as ray:
        placement = Placement(
            stage="pretrain",
            processes=4,
            threads=1,
            device="cpu",
            run_dir=RunDir(folder),
            machines=2,
            candidates=tuple(machine for machine in alive_machines() if machine.cpus >= 2),
        )
        for _ in range(count):
            with worker_group(placement, ray.check, ray.check) as group:
                locals_ = [group.environment(rank)["LOCAL_RANK"] for rank in range(4)]
                print(f"{group.describe()}; local {' '.join(locals_)}", flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
