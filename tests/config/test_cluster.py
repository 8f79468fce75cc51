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

ON_KUBERNETES = (
    *("cluster=kubernetes", "cluster.nodes=2", "cluster.devices_per_node=4"),
    *("cluster.kubernetes.image=r.example:5000/a/b:1.0", "data.toy.root=/data/toy"),
)
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
        (["cluster=kubernetes"], "kubernetes.image: no image is named", "docker/Dockerfile"),
        (
            [*ON_KUBERNETES, "cluster.kubernetes.image=r.example:5000/a/b"],
            "r.example:5000/a/b has no tag",
            "r.example:5000/a/b:TAG",
        ),
        ([*ON_KUBERNETES, "cluster.kubernetes.image=a b:1"], "is no name of an image", "NAME:TAG"),
        ([*ON_KUBERNETES, "cluster.kubernetes.cpus=2"], "2 cores are less than one", "4 or more"),
        ([*ON_KUBERNETES, "cluster.kubernetes.cpus=null"], "cores of a worker", "4 or more"),
        ([*ON_KUBERNETES, "cluster.kubernetes.memory=null"], "memory of a worker", "512Gi"),
        (
            [*ON_KUBERNETES, "cluster.kubernetes.claims.runs=null"],
            "no claim is named",
            "name: NAME",
        ),
        (
            [*ON_KUBERNETES, "cluster.kubernetes.claims.data.path=/runs"],
            "both claims are mounted at /runs",
            "another folder",
        ),
        ([*ON_KUBERNETES, "cluster.runs=/elsewhere"], "/elsewhere is not on the claim", "leave it"),
        (
            [*ON_KUBERNETES, "data.toy.root=/home/me/images"],
            "data.toy.root: pods do not see /home/me/images, only /runs and /data",
            "s3://",
        ),
        (
            [*ON_KUBERNETES, "cluster.network.environment.S3_SECRET_KEY=x"],
            "S3_SECRET_KEY looks like a secret",
            "read a file",
        ),
    ],
)
def test_contradictions_are_refused(
    tmp_path: Path, overrides: list[str], cause: str, remedy: str
) -> None:
    message = error_message(tmp_path, JOB, *overrides)
    assert cause in message
    assert remedy in message


@pytest.mark.parametrize(
    "image",
    ["a:1", "a/b@sha256:" + "0" * 64, "r.example:5000/a/b:1.0", "r.example/a:1@sha256:" + "0" * 64],
)
def test_images_with_a_tag_or_a_digest_are_accepted(tmp_path: Path, image: str) -> None:
    settings = [*ON_KUBERNETES, f"cluster.kubernetes.image={image}"]
    loaded = load_job(write(tmp_path, JOB), settings)
    check(loaded.job, machine.world_size(loaded.job.cluster), loaded.origins)


def test_run_directories_on_kubernetes_lie_on_their_claim(tmp_path: Path) -> None:
    loaded = load_job(write(tmp_path, JOB), ON_KUBERNETES)
    assert loaded.job.cluster.runs_folder == "/runs"
    loaded = load_job(write(tmp_path, JOB), [*ON_KUBERNETES, "cluster.runs=/runs/team"])
    assert loaded.job.cluster.runs_folder == "/runs/team"


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
