"""Which checkpoints stay."""

from __future__ import annotations

import pytest

from pipeline.checkpoint.retention import Retention

STEPS = [400, 800, 1200, 1600, 2000, 2400]


@pytest.mark.parametrize(
    ("retention", "kept"),
    [
        (Retention(last=2), {2000, 2400}),
        (Retention(last=9), set(STEPS)),
        (Retention(last=1, every_steps=1000), {1200, 2000, 2400}),
        (Retention(last=1, scores={800: 0.5, 1600: 0.4}), {800, 2400}),
        # Of equal ones the latest; a score without a checkpoint does not count.
        (Retention(last=1, scores={400: 0.5, 800: 0.5, 1000: 0.9}), {800, 2400}),
        # Others than multiples of `regular` are of stop requests.
        (Retention(last=2, regular=800), {1600, 2400}),
        (Retention(last=1, regular=1000), {2000, 2400}),
        (Retention(last=2, regular=1600, final=2400), {1600, 2400}),
        (Retention(last=2, every_steps=1000, scores={800: 0.5}), {800, 1200, 2000, 2400}),
    ],
)
def test_the_last_one_per_interval_and_the_best_stay(retention: Retention, kept: set[int]) -> None:
    assert retention.kept(STEPS) == kept
    assert retention.kept(sorted(kept)) == kept  # what stays now stays at the next deletion


def test_one_checkpoint_always_stays() -> None:
    assert Retention(last=1, every_steps=1000, scores={}).kept([5]) == {5}
