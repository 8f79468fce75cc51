"""Environment variables of the processes, and what a process reads from them."""

from __future__ import annotations

import pytest

from pipeline.runtime import environment
from pipeline.runtime.dist_env import DistEnv


def test_a_process_reads_the_coordinates_that_its_launcher_sets(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in environment.rank_of_group(5, 8, 1, 4).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("PIPELINE_GENERATION", "3")
    assert DistEnv.from_environment() == DistEnv(rank=5, size=8, local_rank=1, generation=3)


def test_without_a_launcher_a_process_is_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "PIPELINE_GENERATION"):
        monkeypatch.delenv(name, raising=False)
    alone = DistEnv.from_environment()
    assert alone == DistEnv()
    assert alone.is_main


def test_only_a_process_on_the_cpu_selects_the_cpu_accelerator() -> None:
    assert environment.training_process("cpu", 2)["DS_ACCELERATOR"] == "cpu"
    assert "DS_ACCELERATOR" not in environment.training_process("cuda", 2)
    assert environment.deepspeed_import("cuda") == {"DS_BUILD_OPS": "0"}
