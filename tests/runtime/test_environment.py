"""Environment variables of the processes, and what a process reads from them."""

from __future__ import annotations

import os

import pytest
import torch

from pipeline.errors import StageError
from pipeline.runtime import environment
from pipeline.runtime.device_memory import out_of_memory_named
from pipeline.runtime.dist_env import DistEnv


def test_a_process_reads_the_coordinates_that_its_launcher_sets(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in environment.rank_of_group(5, 8, 1, 4).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("PIPELINE_GENERATION", "3")
    assert DistEnv.from_environment() == DistEnv(
        rank=5, size=8, local_rank=1, local_size=4, generation=3
    )


def test_without_a_launcher_a_process_is_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "PIPELINE_GENERATION"):
        monkeypatch.delenv(name, raising=False)
    alone = DistEnv.from_environment()
    assert alone == DistEnv()
    assert alone.is_main


def test_only_a_process_on_the_cpu_selects_the_cpu_accelerator() -> None:
    assert environment.training_process("cpu", 2)["DS_ACCELERATOR"] == "cpu"
    assert "DS_ACCELERATOR" not in environment.training_process("cuda", 2)
    assert environment.deepspeed_import("cuda") == {"DS_BUILD_OPS": "0"}


def test_the_interface_of_collectives_is_only_set_if_one_is_named() -> None:
    assert environment.collectives("ib0") == {
        "GLOO_SOCKET_IFNAME": "ib0",
        "NCCL_SOCKET_IFNAME": "ib0",
    }
    assert environment.collectives("") == {}


def test_a_device_that_ray_has_chosen_comes_before_the_local_rank(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.delenv("PIPELINE_DEVICE", raising=False)
    assert DistEnv.from_environment().device_index == 3
    monkeypatch.setenv("PIPELINE_DEVICE", "0")
    assert DistEnv.from_environment().device_index == 0


def test_out_of_memory_names_the_setting_and_other_errors_pass() -> None:
    text = (
        "CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has a total capacity of 79.10 GiB "
        "of which 3.00 GiB is free. If reserved but unallocated memory is large try setting ..."
    )
    with (
        pytest.raises(StageError) as error,
        out_of_memory_named("stages.evaluate.batch", 64, "take a smaller batch"),
    ):
        raise torch.OutOfMemoryError(text)
    assert error.value.message == (
        "stages.evaluate.batch: out of memory on the device with 64 images per process: CUDA out "
        "of memory. Tried to allocate 20.00 GiB. GPU 0 has a total capacity of 79.10 GiB of which "
        "3.00 GiB is free.\n  -> take a smaller batch"
    )
    with pytest.raises(ValueError, match="another"), out_of_memory_named("key", 1, "remedy"):
        raise ValueError("another")


@pytest.mark.parametrize(
    "name",
    [
        "TORCHELASTIC_USE_AGENT_STORE",
        "OMPI_COMM_WORLD_LOCAL_RANK",
        "PMI_RANK",
        "PMIX_RANK",
        "MV2_COMM_WORLD_LOCAL_RANK",
        "PET_NNODES",
    ],
)
def test_variables_of_other_launchers_are_forgotten(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, "1")
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    environment.forget_other_launchers()
    assert name not in os.environ
    assert os.environ["SLURM_JOB_ID"] == "7"
