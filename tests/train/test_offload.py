"""Optimizer state on the host or in files: the same bits, and nothing left behind."""

from __future__ import annotations

import resource
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.errors import StageError
from pipeline.train.offload import zeros_on_disk
from tests.train import processes, small_network
from tests.train.small_network import Options


def losses(path: Path, stage: int, offload: str, **options: Any) -> list[float]:
    """Losses of six steps on two ranks, with a checkpoint and a resume after the third."""
    result: list[float] = []
    for steps in (3, 6):
        settings = Options(
            checkpoints=path / "checkpoints", stage=stage, offload=offload, steps=steps, **options
        )
        reports = processes.run(path, 2, small_network.steps, settings)
        assert isinstance(reports[0], dict), reports
        result += reports[0]["losses"]
    return result


@pytest.mark.parametrize(("stage", "precision"), [(1, "fp32"), (2, "bf16"), (3, "bf16")])
def test_offload_changes_no_bit(stage: int, precision: str, tmp_path: Path) -> None:
    folder = tmp_path / "disk"
    on_device = losses(tmp_path / "none", stage, "none", precision=precision)
    assert len(on_device) == 6
    assert losses(tmp_path / "cpu", stage, "cpu", precision=precision) == on_device
    assert losses(tmp_path / "files", stage, str(folder), precision=precision) == on_device
    assert not list(folder.iterdir())  # the files end with the process


def test_a_step_that_is_not_finite_is_skipped_with_offload_too(tmp_path: Path) -> None:
    settings = Options(
        checkpoints=tmp_path / "c", stage=2, offload="cpu", nonfinite_step=1, steps=3
    )
    reports = processes.run(tmp_path, 2, small_network.steps, settings)
    assert isinstance(reports[0], dict), reports
    assert reports[0]["applied"] == [True, False, True]


def test_a_file_holds_what_is_written_to_it(tmp_path: Path) -> None:
    like = torch.empty(3, 5)
    values = zeros_on_disk(like, tmp_path / "new" / "folder")
    assert values.shape == like.shape
    assert not values.any()
    values += 2
    assert float(values.sum()) == 30
    assert zeros_on_disk(torch.empty(0), tmp_path / "unused").numel() == 0


def test_a_full_disk_is_an_error_with_a_remedy(tmp_path: Path) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(StageError, match="no room for the optimizer's state") as error:
            zeros_on_disk(torch.empty(1000), tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "offload_optimizer" in error.value.remedy
    assert not list(tmp_path.iterdir())
