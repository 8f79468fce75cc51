"""The forecast of small networks against what their runs measure, on a CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pipeline.plan.check_run import check_text, compare
from tests.train import staging

NETWORKS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    # Of the quickstart: exact columns, intermediate supervision.
    "convnext": (
        {"channels": [16, 32, 64, 128], "depths": [1, 1, 1, 1], "columns": 4},
        {"image_size": 64, "global_batch": 64, "micro_batch": 32},
    ),
    # Of the job for one's own images: stored columns, a fine stem, one head.
    "residual": (
        {"channels": [64, 128, 128, 128], "depths": [1, 1, 1, 1], "columns": 2, "stem_stride": 2}
        | {"activations": "stored"},
        {"image_size": 32, "global_batch": 64, "intermediate_supervision": False},
    ),
    "c2f": (
        {"channels": [48, 96, 144, 192], "depths": [1, 2, 2, 1], "columns": 6},
        {"image_size": 96, "global_batch": 32, "ema_decay": 0.9},
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("block", NETWORKS)
def test_peak_memory_and_checkpoints_are_as_forecast(block: str, tmp_path: Path) -> None:
    model, train = NETWORKS[block]
    settings = {"zero_stage": 2, "max_steps": 2, "warmup_epochs": 0, "augment": {}}
    job = staging.job(pretrain=settings | train, block=block, drop_path=0, **model)
    run_dir = staging.prepared_run(tmp_path, train=128, validation=1)
    results = staging.run_stage(run_dir, 1, job)
    assert isinstance(results[0], dict), results
    # Stands for the driver, which records the job of each stage.
    run_dir.started_with("pretrain").write_text(job.model_dump_json(by_alias=True))
    print(check_text(run_dir))
    errors = {row.name: row.error for row in compare(run_dir, "pretrain")}
    assert abs(errors["peak memory"]) < 0.15
    assert abs(errors["checkpoint"]) < 0.02
