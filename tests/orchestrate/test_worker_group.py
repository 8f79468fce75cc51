"""What each rank of a group over several machines is given."""

from __future__ import annotations

from pathlib import Path
from typing import cast

import pytest

from pipeline.layout import RunDir
from pipeline.orchestrate.machines import Machine
from pipeline.orchestrate.placement import Placement
from pipeline.orchestrate.worker import WorkerPlace, _device_index
from pipeline.orchestrate.worker_group import RankedWorker, WorkerGroup, WorkerHandle

MACHINES = tuple(
    Machine(id=name, address=f"10.0.0.{number}", host=name, cpus=8, gpus=2)
    for number, name in enumerate(("a", "b"), 1)
)


def _group(*, cores: tuple[int, int], threads: int | None = None) -> WorkerGroup:
    """Two processes on each of two machines, on the GPUs 1 and 3 of each."""
    placement = Placement(
        stage="pretrain",
        processes=4,
        threads=threads,
        device="cuda",
        run_dir=RunDir(Path("/runs/small")),
        machines=2,
        candidates=MACHINES,
        interface="ib0",
        variables={"NCCL_DEBUG": "INFO"},
    )
    members = [
        RankedWorker(
            worker=cast(WorkerHandle, None),
            place=WorkerPlace(pid=0, machine=machine.id, device=device, cores=number),
            machine=machine,
        )
        for machine, number in zip(MACHINES, cores, strict=True)
        for device in (1, 3)
    ]
    return WorkerGroup(placement=placement, members=members)


def test_ranks_count_by_machine_and_take_the_device_that_ray_gave() -> None:
    group = _group(cores=(16, 6))
    names = ("RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "PIPELINE_DEVICE", "OMP_NUM_THREADS")
    assert [[group.environment(rank)[name] for name in names] for rank in range(4)] == [
        ["0", "0", "2", "1", "8"],
        ["1", "1", "2", "3", "8"],
        ["2", "0", "2", "1", "3"],
        ["3", "1", "2", "3", "3"],
    ]
    assert group.environment(0)["NCCL_SOCKET_IFNAME"] == "ib0"
    assert group.environment(0)["NCCL_DEBUG"] == "INFO"
    assert group.describe() == "ranks 0-1 on a (10.0.0.1), ranks 2-3 on b (10.0.0.2)"
    assert _group(cores=(16, 6), threads=5).environment(3)["OMP_NUM_THREADS"] == "5"


@pytest.mark.parametrize(
    ("visible", "gpu", "index"), [(None, "3", 3), ("3", "3", 0), ("2,3", "3", 1)]
)
def test_a_gpu_is_counted_among_those_that_the_process_sees(
    monkeypatch: pytest.MonkeyPatch, visible: str | None, gpu: str, index: int
) -> None:
    """Ray hides the other GPUs, unless its machine was started otherwise."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert _device_index(gpu) == index
