"""Metrics per column, memory, times and traces of a stage; the trial before its first step."""

from __future__ import annotations

import json
import math
import resource
import socket
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.checkpoint.manifest import Manifest, list_checkpoints
from pipeline.checkpoint.reader import CheckpointReader
from pipeline.config.schema import Job
from pipeline.errors import StageError
from pipeline.layout import RunDir
from pipeline.model import Network
from pipeline.monitor import tags
from pipeline.monitor.events import Event, read_events
from pipeline.monitor.goodput import Goodput
from pipeline.plan.check_run import Comparison, compare
from pipeline.train import column_norms, trainer
from pipeline.train.network_spec import training_spec
from tests.train import processes, staging

STEPS = 3
SETTINGS: dict[str, Any] = {
    "max_steps": STEPS,
    "checkpoint_every_steps": 1,
    "keep_checkpoints": STEPS,
    "profile_steps": [2],
    "layer_decay": 0.9,
}


def run(folder: Path, world_size: int, job: Job) -> RunDir:
    run_dir = staging.prepared_run(folder)
    results = staging.run_stage(run_dir, world_size, job)
    assert all(isinstance(metrics, dict) for metrics in results), results
    return run_dir


@pytest.fixture(scope="module", params=[0, 2, 3], ids=lambda stage: f"zero {stage}")
def measured(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[RunDir, Job]:
    """A stage of three steps in two processes."""
    job = staging.job(pretrain=SETTINGS | {"zero_stage": request.param})
    return run(tmp_path_factory.mktemp("measured"), 2, job), job


def weights_after(run_dir: RunDir, step: int) -> dict[str, torch.Tensor]:
    directories = dict(list_checkpoints(run_dir.checkpoints("pretrain")))
    reader = CheckpointReader(directories[step], Manifest.read(directories[step]))
    names = Manifest.read(directories[step]).shapes
    return {name: reader.full("master", name) for name in names}


def norm(values: list[torch.Tensor]) -> float:
    return math.sqrt(sum(float(value.double().square().sum()) for value in values))


def of_part(weights: dict[str, torch.Tensor], part: str) -> list[torch.Tensor]:
    prefixes = {"stem": ("stem.",), "heads": ("classifiers.", "decoders.")}
    wanted = prefixes.get(part, (f"columns.{part[-1]}.",))
    return [value for name, value in weights.items() if name.startswith(wanted)]


def last_step(run_dir: RunDir) -> Event:
    return staging.events(run_dir, "step")[-1]


def test_norms_per_column_are_those_of_the_checkpoints(measured: tuple[RunDir, Job]) -> None:
    run_dir, _ = measured
    before = weights_after(run_dir, STEPS - 1)
    after = weights_after(run_dir, STEPS)
    scalars = last_step(run_dir).scalars
    for part in ("stem", "column_0", "column_3", "heads"):
        old = of_part(before, part)
        new = of_part(after, part)
        moved = norm([b - a for a, b in zip(old, new, strict=True)])
        # Fragments of more than 1024 elements are sampled.
        assert scalars[tags.weight_norm(part)] == pytest.approx(norm(old), rel=0.03)
        assert scalars[tags.update_norm(part)] == pytest.approx(moved, rel=0.03)
    parts = ["stem", "heads", *(f"column_{t}" for t in range(4))]
    squares = sum(scalars[tags.gradient_norm(part)] ** 2 for part in parts)
    # Under ZeRO 0 the engine has no norm of all gradients before the first clipping.
    whole = min(scalars.get(tags.GRAD_NORM, math.sqrt(squares)), 5.0)
    assert math.sqrt(squares) == pytest.approx(whole, rel=0.03)
    assert squares > 0


def test_alpha_and_headroom_per_column(measured: tuple[RunDir, Job]) -> None:
    run_dir, _ = measured
    scalars = last_step(run_dir).scalars
    weights = weights_after(run_dir, STEPS)
    for t in range(4):
        alphas = [weights[f"columns.{t}.levels.{i}.alpha"].abs() for i in range(4)]
        smallest = scalars[tags.smallest_alpha(t)]
        largest = scalars[tags.largest_alpha(t)]
        assert smallest == pytest.approx(float(min(alpha.min() for alpha in alphas)))
        assert largest == pytest.approx(float(max(alpha.max() for alpha in alphas)))
    headrooms = [scalars[tags.headroom(t)] for t in range(4)]
    assert min(headrooms) == pytest.approx(math.log2(8192 / scalars[tags.MAX_ABS]))
    assert 5 < min(headrooms) <= max(headrooms) < 20


def test_rates_ranks_and_utilisation_are_logged(measured: tuple[RunDir, Job]) -> None:
    run_dir, _ = measured
    scalars = last_step(run_dir).scalars
    rates = [scalars[tags.group_rate(i)] for i in range(9)]  # depths 0 to 4 + 4
    assert rates[-1] == scalars[tags.LEARNING_RATE]
    assert rates[0] == pytest.approx(0.9**8 * scalars[tags.LEARNING_RATE])
    assert 0 < scalars[tags.MFU] < scalars[tags.HFU] < 1
    assert scalars[tags.HFU] / scalars[tags.MFU] == pytest.approx(4 / 3, rel=0.1)
    assert scalars[tags.SLOWEST_RANK] in (0, 1)
    assert scalars[tags.RANK_SPREAD] >= 0


def test_every_rank_logs_its_times_and_profiles_the_chosen_step(
    measured: tuple[RunDir, Job],
) -> None:
    run_dir, _ = measured
    for rank in (0, 1):
        start, *lines = read_events(run_dir.times("pretrain", rank))
        assert (start.kind, start.step, start.text) == ("start", 0, socket.gethostname())
        assert start.scalars["pid"] > 1
        assert [line.step for line in lines] == [1, 2, 3]
        assert {"data", "forward", "backward", "update"} <= set(lines[0].seconds)
        assert all(seconds >= 0 for line in lines for seconds in line.seconds.values())
        trace = json.loads(run_dir.profile("pretrain", 2, rank).read_text())
        assert any("addmm" in event.get("name", "") for event in trace["traceEvents"])
        assert not run_dir.profile("pretrain", 1, rank).exists()


def test_goodput_of_a_stage_is_divided_by_rank_0(measured: tuple[RunDir, Job]) -> None:
    run_dir, _ = measured
    goodput = Goodput.of(run_dir, ["pretrain"])
    events = read_events(run_dir.events("pretrain"))
    assert goodput.total == pytest.approx(events[-1].time - events[0].time, rel=1e-6)
    for part in ("step", "checkpoint", "evaluation", "start"):
        assert goodput.seconds[part] > 0, part


def test_the_forecast_of_a_run_is_close_to_what_it_measured(measured: tuple[RunDir, Job]) -> None:
    run_dir, job = measured
    # Stands for the driver, which records the job of each stage.
    run_dir.started_with("pretrain").write_text(job.model_dump_json(by_alias=True))
    rows: dict[str, Comparison] = {row.name: row for row in compare(run_dir, "pretrain")}
    assert set(rows) == {"peak memory", "checkpoint", "step"}
    parameters = sum(value.numel() for value in weights_after(run_dir, STEPS).values())
    assert rows["checkpoint"].forecast == 12 * parameters


class _Untried:
    """Replaces the trial before the first step."""

    def __call__(self, *arguments: object) -> None:
        pass


def train_without_a_trial(job: Job, run_dir: RunDir) -> dict[str, float]:
    trainer.try_full_batch = _Untried()
    column_norms.ColumnNorms._stepped = lambda norms, optimizer: iter(())  # type: ignore[method-assign]
    return staging.train(job, "pretrain", run_dir)


@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
def test_neither_the_trial_nor_the_metrics_change_the_weights(
    zero_stage: int, tmp_path: Path
) -> None:
    settings = {"zero_stage": zero_stage, "micro_batch": 4, "max_steps": 2, "drop_path": 0}
    job = staging.job(pretrain=settings, block="residual")  # with running statistics
    usual = run(tmp_path / "usual", 2, job)
    plain = staging.prepared_run(tmp_path / "plain")
    results = processes.run(tmp_path / "output", 2, train_without_a_trial, job, plain)
    assert all(isinstance(metrics, dict) for metrics in results), results
    staging.assert_same_weights(usual, plain)
    assert staging.losses(usual) == staging.losses(plain)


def train_with_little_memory(job: Job, run_dir: RunDir) -> dict[str, float]:
    """Train in a process that may use 300 MB more than it has."""
    torch.zeros(1)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    limit = used + 2_000_000_000
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    return staging.train(job, "pretrain", run_dir)


def test_out_of_memory_shows_before_the_first_step(tmp_path: Path) -> None:
    run_dir = staging.prepared_run(tmp_path, train=512)
    settings = {"global_batch": 512, "image_size": 224, "max_steps": 1}
    job = staging.job(pretrain=settings, channels=[32, 32, 32, 32], activations="stored")
    (error,) = processes.run(tmp_path / "output", 1, train_with_little_memory, job, run_dir)
    assert isinstance(error, StageError), error
    assert error.message.startswith(
        "stages.pretrain.micro_batch: out of memory on the device in a trial before the first step "
        "with 512 images per process: "
    )
    assert "\n  -> --set stages.pretrain.micro_batch=256; the same run resumes. Estimate: " in (
        error.message
    )
    assert not staging.events(run_dir, "step")
    estimate = error.message.split("Estimate: ")[1].partition(" GiB (")[0]
    assert float(estimate) > 2  # more than the process may use


def test_a_network_without_exact_columns_has_no_headroom(tmp_path: Path) -> None:
    job = staging.job(pretrain={"max_steps": 1}, activations="stored")
    run_dir = run(tmp_path, 1, job)
    scalars = last_step(run_dir).scalars
    assert tags.headroom(0) not in scalars
    assert scalars[tags.HFU] == scalars[tags.MFU]
    assert tags.smallest_alpha(3) in scalars
    spec = training_spec(job, job.stages.pretrain, staging.CLASSES)  # type: ignore[arg-type]
    bytes_of_weights = 4 * sum(value.numel() for value in Network(spec).parameters())
    assert scalars[tags.WEIGHTS_MIB] == pytest.approx(bytes_of_weights / 2**20, rel=0.01)
    assert scalars[tags.OPTIMIZER_MIB] == pytest.approx(3 * bytes_of_weights / 2**20, rel=0.01)
    assert scalars[tags.PEAK_MIB] > scalars[tags.STATE_MIB] > 4 * scalars[tags.WEIGHTS_MIB]
