"""The fence: a process group that is not known to be the newest commits nothing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.config.schema import Job
from pipeline.errors import StageError
from pipeline.layout import RunDir
from pipeline.runtime.dist_env import DistEnv
from pipeline.runtime.rank_link import RankLink
from pipeline.train.fence import Fence
from pipeline.train.trainer import train_stage
from tests.train import processes, staging

GENERATION = 1


def train(job: Job, run_dir: RunDir, stop: Callable[[], bool]) -> dict[str, float]:
    """Called in a process: as process group number ``GENERATION`` of a supervisor."""
    return train_stage(job, "pretrain", run_dir, DistEnv(generation=GENERATION), RankLink(stop))


def never() -> bool:
    return False


class DeleteFence:
    """Deletes the generation file after the first step."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __call__(self) -> bool:
        self.path.unlink(missing_ok=True)
        return False


def run_in_process(run_dir: RunDir, stop: Callable[[], bool]) -> object:
    arguments = (staging.job(pretrain={"max_steps": 2}), run_dir, stop)
    (result,) = processes.run(run_dir.logs / "output", 1, train, *arguments)
    return result


@pytest.fixture
def run_dir(tmp_path: Path) -> RunDir:
    run_dir = staging.prepared_run(tmp_path, train=32, validation=1)
    run_dir.stage("pretrain").mkdir()
    return run_dir


def assert_nothing_committed(run_dir: RunDir) -> None:
    assert not list((run_dir.path / "checkpoints").rglob("manifest.json"))
    assert not run_dir.weights("pretrain").exists()


def test_a_replaced_process_group_commits_nothing(run_dir: RunDir) -> None:
    run_dir.fence("pretrain").write_text(str(GENERATION + 1))
    error = run_in_process(run_dir, never)
    assert isinstance(error, StageError)
    assert "newer" in error.message
    assert_nothing_committed(run_dir)


def test_the_newest_process_group_commits(run_dir: RunDir) -> None:
    run_dir.fence("pretrain").write_text(str(GENERATION))
    metrics = run_in_process(run_dir, never)
    assert isinstance(metrics, dict), metrics
    assert run_dir.weights("pretrain").is_file()


def test_a_missing_generation_file_ends_the_stage_at_its_start(run_dir: RunDir) -> None:
    error = run_in_process(run_dir, never)
    assert isinstance(error, StageError)
    assert "generation file is missing" in error.message
    assert not staging.events(run_dir, "step")
    assert_nothing_committed(run_dir)


def test_a_generation_file_deleted_during_training_prevents_the_commit(run_dir: RunDir) -> None:
    fence = run_dir.fence("pretrain")
    fence.write_text(str(GENERATION))
    error = run_in_process(run_dir, DeleteFence(fence))
    assert isinstance(error, StageError)
    assert "generation file is missing" in error.message
    assert str(fence) in error.message
    assert len(staging.events(run_dir, "step")) == 2
    assert_nothing_committed(run_dir)


@pytest.mark.parametrize(
    ("generation", "content", "expected"),
    [
        (None, None, True),  # without a supervisor there is no file
        (1, "1", True),
        (1, "1\n", True),
        (1, "2", False),
        (1, "", False),
        (1, None, False),
    ],
)
def test_only_the_newest_generation_may_commit(
    generation: int | None, content: str | None, expected: bool, tmp_path: Path
) -> None:
    path = tmp_path / "generation"
    if content is not None:
        path.write_text(content)
    assert Fence(path, generation).may_commit() is expected
