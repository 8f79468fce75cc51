"""The job's ``cluster`` section: where the processes run."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt

from pipeline.config.schema.kubernetes import KubernetesConfig
from pipeline.config.schema.rules import Rules
from pipeline.config.schema.section import Section
from pipeline.config.schema.shrink import PROCESSES, fixed

# A variable that NCCL, gloo or the site's fabric reads.
VariableName = Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")]
_DURATION = r"^([0-9]+-)?[0-9]{1,2}:[0-9]{2}:[0-9]{2}$"


class RayConfig(Section):
    """Kind ray: a cluster that exists."""

    address: str = Field(
        "", description="Address of the dashboard of the cluster's head: http://HOST:8265."
    )
    token_file: str = Field(
        "", description="File that holds the access token of the cluster; empty: it asks for none."
    )


class NetworkConfig(Section):
    """How the training processes of several machines reach each other."""

    interface: str = Field(
        "",
        description="Network interface of collectives (eth0, ib0). Empty: the libraries choose.",
    )
    environment: dict[VariableName, str] = Field(
        {}, description="Further variables of the training processes: NCCL_*, GLOO_*. No secrets."
    )


class SlurmConfig(Section):
    """Kind slurm: what the batch job asks for."""

    partition: str = Field("", description="Partition; empty: the default one.")
    account: str = Field("", description="Account that is charged; empty: the default one.")
    qos: str = Field("", description="Quality of service; empty: the default one.")
    constraint: str = Field("", description="Features that the machines must have.")
    time: str = Field(
        "24:00:00",
        pattern=_DURATION,
        description="Time limit of one attempt ([DAYS-]HH:MM:SS). The job is requeued at its end.",
    )
    gpu_option: Literal["per_node", "gres"] = Field(
        "per_node",
        description="How GPUs are asked for: --gpus-per-node, or --gres=gpu:N on older sites.",
    )
    container: str = Field(
        "", description="Image for Pyxis (--container-image), or a .sif file for Apptainer."
    )
    setup: list[str] = Field(
        [], description="Shell lines that run first on every machine, such as `module load cuda`."
    )
    extra: list[str] = Field([], description="Further options of sbatch, each as --name=value.")


class ShardCacheConfig(Section):
    """A cache of remote shards on each machine, shared by its processes."""

    local_folder: str = Field(description="Folder on a local disk of each machine.")
    max_gib: PositiveFloat = Field(description="Size limit on each machine (GiB).")


class ClusterConfig(Section):
    """Where the processes run.

    On a cluster, everything that the size of the job depends on is written here, so that it is
    known on a login node without a GPU: ``nodes`` x ``devices_per_node`` processes on ``device``.
    """

    # Job.cluster allows all of these keys to change when a run resumes.
    kind: Annotated[
        Literal["local", "ray", "slurm", "kubernetes"], Rules(rehearse=fixed("local"))
    ] = Field(
        "local",
        description="'local': a private Ray instance on this machine. 'ray': a Ray cluster that "
        "exists. 'slurm': a batch job. 'kubernetes': a RayJob.",
    )
    device: Annotated[Literal["auto", "cpu", "cuda"], Rules(rehearse=fixed("cpu"))] = Field(
        "auto",
        description="Device to compute on. 'auto': cuda if available, otherwise cpu (kind local).",
    )
    processes: Annotated[PositiveInt | Literal["auto"], Rules(rehearse=fixed(PROCESSES))] = Field(
        "auto",
        description="Number of training processes (world size) on this machine (kind local). "
        "'auto': one per GPU, or two on the CPU.",
    )
    nodes: Annotated[PositiveInt, Rules(rehearse=fixed(1))] = Field(
        1, description="Number of machines."
    )
    devices_per_node: Annotated[PositiveInt, Rules(rehearse=fixed(1))] = Field(
        1, description="GPUs per machine, or processes per machine on CPUs (not for kind local)."
    )
    device_gib: PositiveFloat | None = Field(
        None,
        description="Memory of a GPU (GiB), for micro_batch 'auto' and the memory check on a "
        "cluster. Without it, neither is bounded there.",
    )
    min_nodes: Annotated[PositiveInt | None, Rules(rehearse=fixed(None))] = Field(
        None,
        description="Fewest machines that the run may continue with after a loss. Default: nodes.",
    )
    wait: PositiveInt = Field(
        1800,
        description="Time to wait for machines, at the start and after a loss (seconds).",
    )
    grace: PositiveInt = Field(
        120, description="Longest time that a stop may take, checkpoint included (seconds)."
    )
    hang_timeout: PositiveInt = Field(
        900,
        description="So long may a process of a stage show no progress; then all are started again "
        "(seconds). Within the steps, 20 times the usual time of a step are enough, but not less "
        "than a minute.",
    )
    collective_timeout: PositiveInt = Field(
        1800,
        description="Longest time that a process waits for the others (seconds). Above "
        "hang_timeout, which finds out who is to blame.",
    )
    standby_after: NonNegativeInt = Field(
        600,
        description="After so long, processes stand by to replace those of a stage that fail, so "
        "that it continues sooner (seconds; kind local; 0: never). They take about 0.6 GB each.",
    )
    straggler_factor: PositiveFloat = Field(
        1.5,
        description="A process that takes so many times as long as the others, for data and "
        "forward pass, is named in the log.",
    )
    runs: str = Field(
        "",
        description="Folder of the run directories on the cluster, if this machine does not see "
        "it. Empty: the same path as here; for kind kubernetes, that of the claim for runs.",
    )
    site_check: str = Field(
        "",
        description="Program of the site that `doctor` and the checks before the first stage call "
        "on every machine; it exits with 0 on a healthy one.",
    )
    threads: PositiveInt | Literal["auto"] = Field(
        "auto",
        description="Compute threads per process. 'auto': CPU cores of the machine / processes on "
        "it.",
    )
    loader_threads: PositiveInt | Literal["auto"] = Field(
        "auto",
        description="Image decoding threads per process. 'auto': CPU cores of the machine / "
        "processes on it, at most 16.",
    )
    # A limit in bytes, not in batches: a batch of 640-pixel images is 30 times one of 112 pixels.
    prefetch_mib: PositiveInt = Field(
        512,
        description="Memory limit per process for prefetched batches (MiB). At least two batches "
        "are always prefetched.",
    )
    shard_cache: ShardCacheConfig | None = Field(
        None, description="Cache of remote shards on each machine. Default: none."
    )
    ray: RayConfig = Field(RayConfig(), description="Keys of kind ray.")
    network: NetworkConfig = Field(NetworkConfig(), description="Network between machines.")
    slurm: SlurmConfig = Field(SlurmConfig(), description="Keys of kind slurm.")
    kubernetes: KubernetesConfig = Field(KubernetesConfig(), description="Keys of kind kubernetes.")

    @property
    def runs_folder(self) -> str:
        """``runs``, or its default; '': the run directories have the same path as here."""
        claim = self.kubernetes.claims.runs
        if self.kind == "kubernetes" and claim is not None:
            return self.runs or claim.path
        return self.runs

    @property
    def fewest_nodes(self) -> int:
        """``min_nodes``, or its default."""
        return self.nodes if self.min_nodes is None else self.min_nodes
