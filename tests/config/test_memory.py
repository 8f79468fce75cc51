"""Memory of simulated GPUs: the estimate, the chosen micro-batch, and jobs that are refused."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest

from pipeline.config import job_queries, render
from pipeline.config.check import check
from pipeline.config.check_on_machine import check_on_machine
from pipeline.config.job_queries import training_stages
from pipeline.config.load import LoadedJob, load_job
from pipeline.config.machine import Hardware
from pipeline.config.memory import GIB, MAX_ELEMENTS, StageMemory
from pipeline.config.memory_plan import StagePlan, stage_plan
from pipeline.errors import ConfigError
from pipeline.layout import RunDir
from pipeline.shipped import CONFIGS
from tests.config.jobs import ROOT, each_shipped_job

GPU_80 = 79.1 * GIB  # what the driver reports of an H100
H = ROOT / "jobs/pretrain_revcol_h.yaml"
MIB = 2.0**20

pytestmark = pytest.mark.usefixtures("environment")


def on_gpus(path: Path, count: int, *overrides: str, device_bytes: float = GPU_80) -> LoadedJob:
    """A job checked on ``count`` simulated GPUs."""
    cluster = ["cluster.device=cuda", f"cluster.processes={count}"]
    loaded = load_job(path, [*cluster, *overrides])
    hardware = Hardware(device="cuda", device_bytes=device_bytes)
    return check_on_machine(loaded, RunDir(ROOT / "no-such-run"), hardware=hardware)


def plan(loaded: LoadedJob, stage: str, count: int) -> StagePlan:
    return stage_plan(loaded.job, stage, count, GPU_80)


def memory_of(stage: str, stored: int, count: int = 8) -> StageMemory:
    """The estimate of RevCol-H as shipped, but with ``stored`` columns."""
    return plan(load_job(H), stage, count).memory(stored)


def published_millions() -> dict[str, float]:
    """Parameters of every published size with a 1000-class head, from the comment of its file."""
    comment = re.compile(r"([\d.]+) M parameters with a 1000-class head")
    matches = {
        path.stem: comment.search(path.read_text()) for path in (CONFIGS / "model").glob("*.yaml")
    }
    return {name: float(match[1]) for name, match in sorted(matches.items()) if match}


def test_the_published_sizes_are_found() -> None:
    assert {"revcol_tiny", "revcol_huge"} <= set(published_millions())


@pytest.mark.parametrize(("name", "millions"), published_millions().items())
def test_the_estimate_counts_the_published_parameters(name: str, millions: float) -> None:
    settings = [f"model={name}", "stages.pretrain.intermediate_supervision=false"]
    loaded = load_job(
        ROOT / "jobs/revcol_tiny_1k.yaml", ["stages.pretrain.zero_stage=0", *settings]
    )
    alone = plan(loaded, "pretrain", 1).memory(0)
    shared = plan(load_job(ROOT / "jobs/revcol_tiny_1k.yaml", settings), "pretrain", 2).memory(0)
    # The update needs 8 bytes per parameter, and its share of them on two processes.
    assert alone.update / 8 == pytest.approx(millions * 1e6, rel=0.03)
    assert shared.update == pytest.approx(alone.update / 2)


@pytest.mark.parametrize(
    ("stage", "stored", "traced_mib"),
    [("pretrain", 0, 86), ("pretrain", 8, 924), ("finetune", 0, 680), ("finetune", 8, 7547)],
)
def test_the_estimate_is_close_to_the_traced_tensors_of_revcol_h(
    stage: str, stored: int, traced_mib: float
) -> None:
    estimate = memory_of(stage, stored).image / MIB
    assert traced_mib < estimate < 1.15 * traced_mib  # rather too much than too little


@pytest.mark.parametrize(("count", "gib"), [(1, 41), (8, 9.9), (64, 5.9)])
def test_state_is_shared_out_by_zero_2(count: int, gib: float) -> None:
    # bf16 weights (2 bytes per parameter) stay whole; fp32 gradients (4), weights and moments (12)
    # are shared: for 2.43e9 parameters on 8 GPUs 4.5 + 4.5 GiB, and a buffer of 0.9.
    assert memory_of("pretrain", 0, count).state / GIB == pytest.approx(gib, rel=0.03)


@pytest.mark.parametrize("count", [1, 2, 4, 8, 64])
@each_shipped_job
def test_every_shipped_job_fits_gpus_of_80_gb(path: Path, count: int) -> None:
    if path.stem == "quickstart":
        count = min(count, 8)  # its batch cannot be shared by 64 processes
    loaded = on_gpus(path, count)
    for stage in training_stages(loaded.job):
        train = job_queries.train_config(loaded.job, stage)
        assert isinstance(train.micro_batch, int)
        micro, accumulation = job_queries.batches(train, count)
        assert micro * accumulation * count == train.global_batch
        chosen = plan(loaded, stage, count).of_size(micro)
        assert chosen is not None
        assert micro * chosen.memory.elements < MAX_ELEMENTS
        assert chosen.memory.needed(micro) < 0.92 * GPU_80


@pytest.mark.parametrize(("count", "stored"), [(1, "3 of 8"), (8, "all 8")])
def test_auto_takes_a_micro_batch_that_fits_and_says_so(count: int, stored: str) -> None:
    loaded = on_gpus(H, count)
    assert loaded.job.stages.pretrain is not None
    assert loaded.job.stages.pretrain.micro_batch == 64  # not 512 or 4096
    note = next(note for note in loaded.notes if note.startswith("stages.pretrain.micro_batch"))
    assert re.fullmatch(
        r"stages\.pretrain\.micro_batch = 64: \d\d\.\d of 71\.3 GiB per GPU \(estimate\), "
        f"{stored} columns stored",
        note,
    )
    assert loaded.origins["stages.pretrain.micro_batch"].startswith("chosen: ")
    plan_text = render.dry_run(loaded, world_size=count).partition("# Plan")[2]
    assert f"4096 = {count} x 64 x {64 // count}" in plan_text
    assert note in plan_text


def test_with_nothing_stored_auto_takes_as_many_images_as_32_bit_indexing_allows() -> None:
    job = on_gpus(H, 8, "model.stored_columns=0").job
    assert job.stages.pretrain is not None
    assert job.stages.finetune is not None
    # 512 and 64 images fit the memory, but tensors of 475 and 58 images have 2^31 elements.
    assert job.stages.pretrain.micro_batch == 256
    assert job.stages.finetune.micro_batch == 32


@pytest.mark.parametrize(("offload", "gib"), [("none", 4.3), ("cpu", 2.2)])
def test_an_optimizer_on_the_host_takes_no_memory_of_the_device(offload: str, gib: float) -> None:
    """Peaks of RevCol-B on one H100: 64 images of 224 pixels, ZeRO 1, nothing stored."""
    overrides = ["zero_stage=1", f"offload_optimizer={offload}"]
    loaded = load_job(
        ROOT / "jobs/revcol_base_1k.yaml", [f"stages.pretrain.{value}" for value in overrides]
    )
    of_ten_classes = replace(plan(loaded, "pretrain", 1), classes=10)
    assert of_ten_classes.memory(0).needed(64) / GIB == pytest.approx(gib, rel=0.2)


def test_on_a_cpu_auto_stays_the_whole_share() -> None:
    loaded = load_job(H, ["cluster.device=cpu"])
    hardware = Hardware(device="cpu")
    assert check_on_machine(loaded, RunDir(ROOT / "no-such-run"), hardware=hardware) == loaded


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["stages.pretrain.micro_batch=512", "model.stored_columns=0"],
            "--set: stages.pretrain.micro_batch: 512 images make tensors of 2^31 elements or more, "
            "beyond 32-bit indexing\n  -> micro_batch: auto (it takes 256)",
        ),
        (
            ["stages.pretrain.micro_batch=128", "model.stored_columns=8"],
            "GiB for the update), and 71.3 of 79.1 GiB are usable"
            "\n  -> micro_batch: auto (it takes 64)",
        ),
    ],
)
def test_a_micro_batch_that_does_not_fit_is_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        on_gpus(H, 8, *overrides)


PRETRAIN_ONLY = ["stages.finetune=null", "stages.evaluate=null", "stages.export=null"]


def test_a_job_that_cannot_fit_is_refused_with_a_remedy_that_helps() -> None:
    with pytest.raises(ConfigError) as error:
        on_gpus(H, 1, *PRETRAIN_ONLY, device_bytes=23.6 * GIB)
    assert (
        "stages.pretrain.micro_batch: 2 images need 59.8 GiB per GPU (41.7 GiB of weights, "
        "gradients and optimizer, and 0.16 GiB per image or 18.1 GiB for the update), and 20.2 of "
        "23.6 GiB are usable"
    ) in error.value.message
    # One GPU has nobody to share with, and smaller images do not shrink the state.
    assert error.value.message.endswith("\n  -> 4 GPUs")
    on_gpus(H, 4, *PRETRAIN_ONLY, device_bytes=23.6 * GIB)
    with pytest.raises(ConfigError, match=r"-> zero_stage: 3 without compile or "):
        on_gpus(H, 64, *PRETRAIN_ONLY, device_bytes=8 * GIB)
    zero_3 = ["stages.pretrain.zero_stage=3", "model.compile=false"]
    on_gpus(H, 64, *PRETRAIN_ONLY, *zero_3, device_bytes=8 * GIB)
    with pytest.raises(ConfigError, match="-> more or larger GPUs, or a smaller model"):
        on_gpus(H, 1, *PRETRAIN_ONLY, device_bytes=2 * GIB)


def test_the_shipped_settings_of_revcol_h_are_the_best_that_the_estimate_finds() -> None:
    """Columns that store their activations are not computed twice: a third of their time."""
    shipped = {}
    for zero_stage in (1, 2, 3):
        settings = [f"stages.pretrain.zero_stage={zero_stage}"]
        settings += ["model.compile=false"] if zero_stage == 3 else []
        settings += ["stages.pretrain.micro_batch=64"]
        loaded = load_job(H, settings)
        chosen = plan(loaded, "pretrain", 8).of_size(64)
        shipped[zero_stage] = 0 if chosen is None else chosen.stored
    assert shipped[2] == max(shipped.values()) == 8
    job = load_job(H).job
    for stage in training_stages(job):
        assert job_queries.train_config(job, stage).zero_stage == 2
    assert job.model.compile
    assert job.model.stored_columns == "auto"


def test_an_unknown_machine_refuses_nothing() -> None:
    job = load_job(H, ["stages.pretrain.micro_batch=4096"]).job
    check(job, 1)  # a rehearsal checks the real job, whatever GPUs it will run on
