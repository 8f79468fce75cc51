"""Every optimizer of the registry: the same under every ZeRO stage and world size; resumes."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.checkpoint.manifest import Manifest, list_checkpoints
from pipeline.checkpoint.reader import CheckpointReader
from pipeline.errors import CheckpointError
from pipeline.optimizers import registry
from tests.train import processes, small_network, staging
from tests.train.small_network import Options

STEPS = 4
# Sums over several ranks are added in another order, and each step carries the rounding on. The
# distance is relative to the parameter's change in these steps. Measured: 2e-4 for the worst
# parameter, 6e-6 for all parameters together.
TOLERANCE = 1e-3
RESOLUTION = 1e-7  # of fp32: below it, small changes of large weights are lost
Values = dict[str, dict[str, torch.Tensor]]  # by kind and parameter
each_optimizer = pytest.mark.parametrize("optimizer", registry.facts())


def train(path: Path, world_size: int, stage: int, **options: Any) -> dict[str, Any]:
    """Train the small network in ``path``; the report of rank 0."""
    settings = Options(checkpoints=path / "checkpoints", stage=stage, **options)
    results = processes.run(path, world_size, small_network.steps, settings)
    assert isinstance(results[0], dict), results
    first: dict[str, Any] = results[0]
    return first


def newest(path: Path) -> Values:
    """All values of the newest checkpoint."""
    directory = list_checkpoints(path / "checkpoints")[0][1]
    manifest = Manifest.read(directory)
    reader = CheckpointReader(directory, manifest)
    return {
        kind: {name: reader.full(kind, name) for name in sorted(reader.shapes)}
        for kind in manifest.kinds
    }


def flat(values: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.cat([value.flatten() for value in values.values()]).double()


# AdamW has this test in test_engine.py.
@pytest.fixture(scope="module", params=[name for name in registry.facts() if name != "adamw"])
def single(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """(optimizer, initial values, values after four steps) of one process without ZeRO."""
    path = tmp_path_factory.mktemp("single")
    train(path, 1, 0, optimizer=request.param, steps=0)
    start = newest(path)
    train(path, 1, 0, optimizer=request.param, steps=STEPS)
    return request.param, start, newest(path)


@pytest.mark.parametrize(("world_size", "stage"), [(2, 0), (2, 1), (2, 2), (2, 3), (1, 3)])
def test_ranks_and_zero_stages_give_the_weights_of_a_single_process(
    single: tuple[str, Values, Values], world_size: int, stage: int, tmp_path: Path
) -> None:
    optimizer, start, expected = single
    train(tmp_path, world_size, stage, optimizer=optimizer, steps=STEPS)
    trained = newest(tmp_path)
    assert list(trained) == ["master", *registry.kind(optimizer).moments, "ema"]
    for name, value in expected["master"].items():
        change = (value - start["master"][name]).norm()
        distance = (trained["master"][name] - value).norm()
        assert distance <= TOLERANCE * change + RESOLUTION * value.norm(), name
    assert not torch.equal(flat(expected["master"]), flat(start["master"]))
    for moment in registry.kind(optimizer).moments:
        size = flat(expected[moment]).norm()
        assert size > 0
        assert (flat(trained[moment]) - flat(expected[moment])).norm() < TOLERANCE * size


@each_optimizer
def test_resume_is_bit_exact_and_another_world_size_resumes_too(
    optimizer: str, tmp_path: Path
) -> None:
    train(tmp_path / "a", 2, 2, optimizer=optimizer)
    train(tmp_path / "b", 2, 2, optimizer=optimizer, steps=2)
    shutil.copytree(tmp_path / "b", tmp_path / "c")
    train(tmp_path / "b", 2, 2, optimizer=optimizer)
    complete = newest(tmp_path / "a")
    resumed = newest(tmp_path / "b")
    assert list(resumed) == list(complete)
    for kind, values in complete.items():
        for name, value in values.items():
            assert torch.equal(resumed[kind][name], value), (kind, name)
    train(tmp_path / "c", 1, 3, optimizer=optimizer)
    other = flat(newest(tmp_path / "c")["master"])
    assert (other - flat(complete["master"])).norm() < 1e-5 * other.norm()


@each_optimizer
def test_without_zero_a_step_with_nonfinite_gradients_is_skipped(
    optimizer: str, tmp_path: Path
) -> None:
    """The engines of ZeRO 1 to 3 skip such a step themselves."""
    report = train(tmp_path, 1, 0, optimizer=optimizer, nonfinite_step=1, steps=3)
    assert report["applied"] == [True, False, True]
    for kind, values in newest(tmp_path).items():
        assert flat(values).isfinite().all(), kind


def test_a_checkpoint_of_another_optimizer_is_refused(tmp_path: Path) -> None:
    """AdamW and LAMB have moments of the same names, which mean the same; their steps do not."""
    run_dir = staging.prepared_run(tmp_path)
    settings = {"max_steps": 2, "global_batch": 8}
    staging.run_stage(run_dir, 1, staging.job(settings))
    (error,) = staging.run_stage(run_dir, 1, staging.job(settings | {"optimizer": "lamb"}))
    assert isinstance(error, CheckpointError), error
    assert "(optimizer: saved adamw, now lamb)" in error.message
