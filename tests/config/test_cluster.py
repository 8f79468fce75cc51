"""The cluster section: sizes known without the machines, and contradictions in words."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.config import machine
from pipeline.config.check import check
from pipeline.config.check_on_machine import check_on_machine
from pipeline.config.load import load_job
from pipeline.errors import ConfigError
from pipeline.layout import RunDir
from tests.config.jobs import JOB, error_message, write

ON_SLURM = ("cluster=slurm", "cluster.nodes=2", "cluster.devices_per_node=4")


def test_the_world_of_a_cluster_follows_from_its_file(tmp_path: Path) -> None:
    loaded = load_job(write(tmp_path, JOB), ON_SLURM)
    cluster = loaded.job.cluster
    assert machine.world_size(cluster) == 8
    assert machine.device(cluster) == "cuda"
    hardware = machine.hardware(cluster)
    assert hardware.device_bytes == 80 * 2**30
    assert hardware.driver_cuda is None  # of this machine, whose driver says nothing
    check(loaded.job, machine.world_size(cluster), loaded.origins)


@pytest.mark.parametrize(
    ("overrides", "cause", "remedy"),
    [
        (["cluster.nodes=2"], "cluster.nodes: kind local is one machine", "--on NAME"),
        ([*ON_SLURM, "cluster.processes=8"], "cluster.processes: kind slurm has nodes x", "nodes"),
        ([*ON_SLURM, "cluster.device=auto"], "cluster.device: this machine does not", "cuda"),
        ([*ON_SLURM, "cluster.min_nodes=3"], "cluster.min_nodes: 3 is more than the 2", "1 to 2"),
        (["cluster=ray"], "cluster.ray.address: no cluster is named", "http://HOST:8265"),
        (
            ["cluster.network.environment.WANDB_API_KEY=x"],
            "WANDB_API_KEY looks like a secret",
            "read a file",
        ),
        ([*ON_SLURM, "cluster.slurm.extra=['; rm -rf x']"], "is no option of sbatch", "--name"),
    ],
)
def test_contradictions_are_refused(
    tmp_path: Path, overrides: list[str], cause: str, remedy: str
) -> None:
    message = error_message(tmp_path, JOB, *overrides)
    assert cause in message
    assert remedy in message


def test_a_batch_that_the_machines_cannot_share_is_refused(tmp_path: Path) -> None:
    loaded = load_job(write(tmp_path, JOB), [*ON_SLURM, "cluster.nodes=3"])
    with pytest.raises(ConfigError, match="cannot be shared evenly by 12 processes"):
        check_on_machine(loaded, RunDir(tmp_path / "run"))


def test_threads_are_shared_out_by_the_processes_of_a_machine(tmp_path: Path) -> None:
    cluster = load_job(write(tmp_path, JOB), ON_SLURM).job.cluster
    assert machine.threads(cluster, 1) == machine.cores()
    assert machine.loader_threads(cluster, 10**6) == 1


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"cpu.max": "200000 100000"}, 2),
        ({"cpu.max": "max 100000"}, None),
        ({"cpu/cpu.cfs_quota_us": "300000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 3),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, None),
        ({}, None),
    ],
)
def test_a_quota_of_either_version_of_cgroups_counts(
    tmp_path: Path, files: dict[str, str], expected: int | None
) -> None:
    (tmp_path / "cpu").mkdir()
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    assert machine._quota(tmp_path) == expected
