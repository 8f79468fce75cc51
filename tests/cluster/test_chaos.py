"""The command chaos on a cluster: a real Slurm, whose machines are reached by a real SSH."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path

from tests.cluster.ray_runs import PreparedJob
from tests.cluster.slurm_machines import SlurmMachines
from tests.cluster.slurm_runs import CLUSTER, wait_for_nothing_left
from tests.cluster.ssh import start_ssh
from tests.prepare.source_folders import class_tars

SEED = "4"  # the first fault cuts a link
LIMIT_S = 900.0


def test_a_run_on_a_cluster_survives_a_cut_link_with_equal_results(
    slurm: SlurmMachines, shared_folder: Path
) -> None:
    machines = [slurm.fabric[name] for name in ("n1", "n2", "n3")]
    reach = [*start_ssh(machines, shared_folder / "ssh"), "{host}"]
    class_tars(shared_folder / "images", classes=4, count=28, validation=4)
    (shared_folder / "job.yaml").write_text(PreparedJob(shared_folder).text)
    (shared_folder / "slurm.yaml").write_text(
        CLUSTER.format(
            nodes=2, min_nodes=1, wait=60, runs=shared_folder, partition="normal", setup="[]"
        )
    )
    done = slurm.login.run(
        *("env", "-C", shared_folder, sys.executable, "-m", "pipeline", "chaos", "job.yaml"),
        *("--on", "slurm.yaml", "--reach", shlex.join(reach), "--faults", "1", "--seed", SEED),
        environment=slurm.environment,
        timeout=LIMIT_S,
        check=False,
    )
    logs = [path.read_text() for path in shared_folder.glob("runs/small-chaos-*/*.txt")]
    assert done.returncode == 0, done.stdout + done.stderr + "\n".join(logs)
    assert "all results are equal; faults: 1" in done.stdout
    result = json.loads((shared_folder / f"runs/small-chaos-{SEED}/chaos.json").read_text())
    [cut] = result["faults"]
    assert cut["fault"] == "cut link"
    assert cut["seconds"] > 10  # until Ray gave up the machine
    # Every machine has its routes back.
    for machine in machines:
        assert "blackhole" not in machine.run("ip", "route").stdout
    wait_for_nothing_left(slurm)
