"""Plans against hand arithmetic, published figures and measurements; the text of the command."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from pipeline.config.devices import DEVICES
from pipeline.config.load import load_job
from pipeline.config.memory import GIB, checkpoint_bytes
from pipeline.config.memory_plan import StagePlan, stage_plan
from pipeline.config.schema import Job
from pipeline.errors import ConfigError
from pipeline.orchestrate.plan_job import plan
from pipeline.plan.forecast import Forecast, alternatives, forecast
from tests.config.jobs import ROOT

H = ROOT / "jobs/pretrain_revcol_h.yaml"
H100 = DEVICES["h100"]
# RevCol-H: 2.158 billion parameters in stem and columns. Heads of pretraining: four classifiers of
# 21,841 classes and three linear decoders of 3 x 32 x 32 pixels, on 2880 channels. Of fine-tuning:
# one classifier.
BODY = 2.15455e9
PARAMETERS = {
    "pretrain": BODY + 4 * 21_841 * 2880 + 3 * 3072 * 2880,
    "finetune": BODY + 1000 * 2880,
}
GMACS = {"pretrain": 310.6, "finetune": 2535.6}  # of stem and columns, per image


def stage_of_h(stage: str, gpus: int, zero_stage: int, **model: object) -> tuple[Job, StagePlan]:
    compiles = zero_stage < 3
    settings = [f"stages.{stage}.zero_stage={zero_stage}", f"model.compile={str(compiles).lower()}"]
    settings += [f"model.{key}={str(value).lower()}" for key, value in model.items()]
    job = load_job(H, settings, plans=True).job
    return job, stage_plan(job, stage, gpus, 79.1 * GIB)


def h_forecast(
    stage: str, gpus: int, zero_stage: int, stored: int = 8, **model: object
) -> Forecast:
    _, staged = stage_of_h(stage, gpus, zero_stage, **model)
    micro_batch = 64 if stage == "pretrain" else 8
    return forecast(staged, H100, micro_batch=micro_batch, stored=stored, images=None)


@pytest.mark.parametrize("stage", ["pretrain", "finetune"])
@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
@pytest.mark.parametrize("gpus", [1, 8, 64])
def test_the_state_of_revcol_h_is_that_of_hand_arithmetic(
    stage: str, zero_stage: int, gpus: int
) -> None:
    """In bf16; the first terms are weights, gradients, fp32 weights with two moments, and EMA."""
    p = PARAMETERS[stage]
    ema = 4 * p if stage == "finetune" else 0
    n = gpus
    largest = 2 * 8 * 2880**2 + 4 * 1440 * 2880  # level 3: blocks, and the layer from level 2
    by_hand = {
        0: 2 * p + 2 * p + 8 * p + ema + 1e9,
        1: 2 * p + 2 * p + (12 * p + ema) / n + 1e9,
        2: 2 * p + 4 * p / n + (12 * p + ema) / n + 1e9,
        3: 2 * p / n + 2 * 5 * largest + 4 * p / n + (12 * p + ema) / n + 2e9,
    }
    expected = h_forecast(stage, gpus, zero_stage)
    assert expected.sizes.parameters == pytest.approx(p, rel=2e-3)
    assert expected.memory.state == pytest.approx(by_hand[zero_stage], rel=3e-3)


@pytest.mark.parametrize("stage", ["pretrain", "finetune"])
@pytest.mark.parametrize("gpus", [1, 8, 64])
def test_time_and_traffic_of_revcol_h_are_those_of_hand_arithmetic(stage: str, gpus: int) -> None:
    p = PARAMETERS[stage]
    batch = 4096 if stage == "pretrain" else 512
    micro_batch = 64 if stage == "pretrain" else 8
    accumulation = batch // (gpus * micro_batch)
    for zero_stage, passes in {1: 2, 2: accumulation + 1, 3: 3 * accumulation}.items():
        expected = h_forecast(stage, gpus, zero_stage)
        sent = passes * 2 * p if gpus > 1 else 0
        assert expected.time.traffic == pytest.approx(sent, rel=3e-3)
    # Six operations per multiply-add; with nothing stored every column is computed again.
    stored = h_forecast(stage, gpus, 2)
    assert stored.work.model_flops == pytest.approx(6e9 * GMACS[stage], rel=0.01)
    assert stored.hfu == stored.mfu
    inverted = h_forecast(stage, gpus, 2, stored=0)
    assert inverted.hfu / inverted.mfu == pytest.approx(4 / 3, rel=0.01)


def test_a_checkpoint_of_revcol_h_has_the_published_size() -> None:
    expected = h_forecast("pretrain", 8, 2)
    assert expected.checkpoint_bytes == pytest.approx(12 * PARAMETERS["pretrain"], rel=2e-3)
    assert pytest.approx(25.9e9, rel=2e-3) == 12 * BODY


@pytest.mark.parametrize(
    ("stage", "stored", "compiled", "milliseconds", "mfu"),
    [
        ("pretrain", 0, False, 579, 0.209),
        ("pretrain", 8, False, 430, 0.281),
        ("pretrain", 8, True, 400, 0.303),
        ("pretrain", 0, True, 533, 0.227),
        ("finetune", 8, False, 437, 0.282),
    ],
)
def test_the_passes_of_revcol_h_take_as_long_as_measured_on_an_h100(
    stage: str, stored: int, compiled: bool, milliseconds: float, mfu: float
) -> None:
    """Forward and backward pass of 64 images of 224 pixels, or 8 of 640, on one GPU."""
    expected = h_forecast(stage, 64, 2, stored, compile=compiled)
    assert 1e3 * expected.time.passes == pytest.approx(milliseconds, rel=0.03)
    flops = expected.micro_batch * expected.work.model_flops
    assert flops / expected.time.passes / 989e12 == pytest.approx(mfu, rel=0.03)


def test_peak_memory_of_revcol_h_is_close_to_that_measured_on_an_h100() -> None:
    """66.7 GiB with all columns stored, of which 8 are weights and gradients; a body without heads.

    Here: the same activations beside the state of the plan.
    """
    expected = h_forecast("pretrain", 8, 2)
    assert 64 * expected.memory.image / GIB == pytest.approx(66.7 - 8, rel=0.03)


def test_the_best_settings_come_first_and_what_does_not_fit_last() -> None:
    job, staged = stage_of_h("pretrain", 8, 2)
    entries = alternatives(job, "pretrain", staged, H100, None)
    best = entries[0]
    assert (best.train.zero_stage, best.stored, best.micro_batch, best.compiled) == (2, 8, 64, True)
    # ZeRO 0 and 1 would lose bits in bf16 here; the checks refuse them.
    assert {entry.train.zero_stage for entry in entries} == {2, 3}
    small = stage_plan(job, "pretrain", 8, 16 * GIB)
    entries = alternatives(job, "pretrain", small, H100, None)
    fits = [entry.fits for entry in entries]
    assert fits == sorted(fits, reverse=True)
    assert not all(fits)


def test_a_plan_needs_no_images_and_shows_hours_and_cost(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("IMAGENET22K", raising=False)
    monkeypatch.delenv("IMAGENET1K", raising=False)
    text = plan(str(H), [], gpus=8, device="h100", price=2.0, images=None)
    assert "pretrain: 8 x h100, 2,433.0 million parameters" in text
    assert "global batch 4096 = 8 x 64 x 8" in text
    assert "peak              69.8 GiB of 71.3 GiB that tensors can fill" in text
    # 14,197,122 images less 0.4% in batches of 4096: 3452 steps per epoch, 90 epochs.
    assert "310,680 steps" in text
    assert "2  8 of 8" in " ".join(text.split()).replace("2 8 of 8", "2  8 of 8")
    assert "best, the job's" in text
    assert "finetune: 8 x h100" in text


def test_a_plan_that_does_not_fit_names_what_helps() -> None:
    text = plan(str(H), ["model.stored_columns=8"], gpus=1, device="h100", price=None, images=None)
    assert "does not fit" not in text  # 'auto' takes a micro-batch that fits
    fixed = ["stages.pretrain.micro_batch=128", "model.stored_columns=8"]
    text = plan(str(H), fixed, gpus=1, device="h100", price=None, images=None)
    assert "does not fit      micro_batch: auto (it takes" in text


def test_unknown_devices_and_jobs_without_training_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="one of h100, h200, cpu"):
        plan(str(H), [], gpus=1, device="tpu", price=None, images=None)
    without = ["stages.pretrain=null", "stages.finetune=null"]
    with pytest.raises(ConfigError, match="trains nothing"):
        plan(str(H), without, gpus=1, device="h100", price=None, images=None)


def test_copies_and_statistics_are_part_of_a_checkpoint() -> None:
    overrides = ["stages.pretrain.ema_decay=0.9", "stages.pretrain.keep=best"]
    job = load_job(ROOT / "jobs/quickstart.yaml", [*overrides, "model.block=c2f"]).job
    staged = stage_plan(job, "pretrain", 2, math.inf)
    sizes = forecast(staged, DEVICES["cpu"], micro_batch=32, stored=0, images=None).sizes
    assert sizes.running_statistics > 0
    assert checkpoint_bytes(sizes, staged.train) == 4 * (
        5 * sizes.parameters + 3 * sizes.running_statistics
    )
