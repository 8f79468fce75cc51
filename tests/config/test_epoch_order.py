"""Keys that decide the order of an epoch: windows, class balance, repeated augmentation."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.config import job_queries, render
from pipeline.config.check import check
from pipeline.config.load import load_job
from pipeline.config.resume_diff import changes
from pipeline.config.schema import TrainConfig
from pipeline.train.schedule import Schedule
from tests.config.jobs import JOB, edited, error_message, load_and_check, write


def with_keys(keys: str) -> str:
    return edited("epochs: 3", f"epochs: 3\n    {keys}")


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (
            "order: window",
            "job.yaml:11: stages.pretrain.order: expected one of 'global', 'windowed', "
            "given \"window\"\n  -> did you mean 'windowed'?",
        ),
        (
            "oder: windowed",
            "job.yaml:11: unknown key 'oder' in stages.pretrain\n  -> did you mean 'order'?",
        ),
        ("on_bad_sample: replce", "given \"replce\"\n  -> did you mean 'replace'?"),
        (
            "window_shards: 0",
            "stages.pretrain.window_shards: expected a whole number above 0, given 0",
        ),
        (
            "repeated_augmentation: 0",
            "stages.pretrain.repeated_augmentation: expected a whole number above 0, given 0",
        ),
        ("balance: 1.5", "stages.pretrain.balance: expected a number from 0 to 1, given 1.5"),
        (
            "repeated_augmentation: 3",
            "job.yaml:11: stages.pretrain.repeated_augmentation: a global batch of 64 images "
            "cannot hold each of its images 3 times"
            "\n  -> take one of 1, 2, 4, or another global_batch",
        ),
        (
            "repeated_augmentation: 64",
            "all 64 images of a step would be views of a single one"
            "\n  -> take fewer, or a larger global_batch",
        ),
        (
            "order: windowed\n    balance: 0.5",
            "job.yaml:12: stages.pretrain.balance: classes cannot be balanced within windows",
        ),
    ],
)
def test_impossible_order_is_refused_with_a_remedy(tmp_path: Path, keys: str, message: str) -> None:
    assert message in error_message(tmp_path, with_keys(keys))


@pytest.mark.parametrize(
    "keys",
    [
        "order: windowed",
        "repeated_augmentation: 4",
        "balance: 1.0",
        "balance: 0",
        "on_bad_sample: replace",
    ],
)
def test_possible_orders_are_accepted_alone_and_with_repeats(tmp_path: Path, keys: str) -> None:
    load_and_check(write(tmp_path, with_keys(keys)))
    load_and_check(write(tmp_path, with_keys(keys)), ["stages.pretrain.repeated_augmentation=2"])


def test_repeats_lengthen_epoch_and_warm_up() -> None:
    config = TrainConfig(
        epochs=2,
        base_lr=1.0,
        base_lr_batch=24,
        global_batch=24,
        repeated_augmentation=3,
        warmup_epochs=1,
    )
    assert job_queries.steps_per_epoch(config, 101) == 12
    assert job_queries.steps(config, 101) == 24
    assert Schedule.of(config, 101).warmup_steps == 12
    assert job_queries.steps(config.model_copy(update={"repeated_augmentation": 1}), 101) == 8
    assert job_queries.steps(config.model_copy(update={"max_steps": 5}), 101) == 5


def test_dry_run_counts_repeats(tmp_path: Path) -> None:
    loaded = load_job(write(tmp_path, with_keys("repeated_augmentation: 2")))
    assert "3 epochs, about 93 steps" in render.dry_run(loaded, images={"toy": 1000})


@pytest.mark.parametrize(
    ("override", "allowed"),
    [
        ("stages.pretrain.order=windowed", False),
        ("stages.pretrain.window_shards=3", False),
        ("stages.pretrain.repeated_augmentation=2", False),
        ("stages.pretrain.balance=0.5", False),
        ("stages.pretrain.on_bad_sample=replace", True),
        ("cluster.prefetch_mib=64", True),
    ],
)
def test_c8_order_must_not_change_on_resume(tmp_path: Path, override: str, allowed: bool) -> None:
    path = write(tmp_path, JOB)
    before = load_job(path).resolved()
    after = load_job(path, [override]).resolved()
    differences = changes(before, after, "pretrain")
    assert [(change.key, not change.changes_result) for change in differences] == [
        (override.partition("=")[0], allowed)
    ]


@pytest.mark.parametrize("repeats", [2, 3])
def test_rehearsal_keeps_repeated_augmentation(tmp_path: Path, repeats: int) -> None:
    keys = f"repeated_augmentation: {repeats}\n    global_batch: 96"
    small = load_job(write(tmp_path, with_keys(keys)), rehearse=True)
    check(small.job, 2, small.origins)
    assert small.job.stages.pretrain is not None
    assert small.job.stages.pretrain.repeated_augmentation == 2


@pytest.mark.parametrize(
    ("key", "phrases"),
    [
        ("order", ["one of 'global', 'windowed'", 'default  "global"']),
        ("window_shards", ["default  16"]),
        ("repeated_augmentation", ["views of each image", "default  1"]),
        ("balance", ["square-root sampling", "default  0.0"]),
        ("on_bad_sample", ["data/replaced_samples", 'default  "stop"']),
        ("prefetch_mib", ["MiB", "default  512"]),
    ],
)
def test_explain_describes_the_order_keys(key: str, phrases: list[str]) -> None:
    text = render.explain(key)
    for phrase in phrases:
        assert phrase in text
