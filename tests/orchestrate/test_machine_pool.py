"""How many machines a run uses, out of those that are left."""

from __future__ import annotations

import pytest

from pipeline.config.schema import Job
from pipeline.orchestrate.machine_pool import MachinePool


def _pool(nodes: int, min_nodes: int, devices: int, batch: int) -> MachinePool:
    train = {"image_size": 32, "epochs": 1, "global_batch": batch, "base_lr": 1e-3}
    job = Job.model_validate(
        {
            "name": "small",
            "model": {"channels": [8, 8, 8, 8], "depths": [1, 1, 1, 1], "columns": 1},
            "cluster": {
                "kind": "ray",
                "nodes": nodes,
                "min_nodes": min_nodes,
                "devices_per_node": devices,
                "device": "cpu",
                "ray": {"address": "http://head:8265"},
            },
            "data": {"images": {"root": "/data"}},
            "stages": {"pretrain": train, "finetune": {**train, "from": "pretrain"}},
        }
    )
    return MachinePool(job=job, head="", check=lambda: None, log=lambda *_: None)


@pytest.mark.parametrize(
    ("available", "used"),
    [(9, 8), (8, 8), (7, 4), (4, 4), (3, 2), (2, 2), (1, 0), (0, 0)],
)
def test_the_largest_number_of_machines_that_share_the_batch_is_used(
    available: int, used: int
) -> None:
    assert _pool(nodes=8, min_nodes=2, devices=8, batch=4096).size(available) == used


def test_fewer_machines_than_the_minimum_are_none() -> None:
    pool = _pool(nodes=8, min_nodes=5, devices=8, batch=4096)
    assert pool.size(8) == 8
    assert pool.size(7) == 0  # five to seven machines do not share the batch
