"""The guard: which steps are bad, when training returns to a checkpoint, and when it gives up."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from pipeline.config.schema import GuardConfig
from pipeline.train.guard import Guard, GuardState
from tests.checkpoint.process_alone import alone


@pytest.fixture(autouse=True)
def group() -> Iterator[None]:
    with alone():
        yield


def guard(state: GuardState | None = None, **settings: object) -> Guard:
    config = GuardConfig.model_validate({"window": 30, "spike_score": 10.0} | settings)
    return Guard(config, torch.device("cpu"), steps_per_epoch=1000, state=state)


def train(guard: Guard, step: int, loss: float, norm: float = 1.0) -> bool:
    """A step of two micro-batches; True if it was applied."""
    guard.begin()
    guard.add(torch.tensor(loss - 0.1))
    guard.add(torch.tensor(loss + 0.1))
    refused = not torch.tensor([loss, norm]).isfinite().all() or guard.refuses(norm)
    if refused:
        guard.skipped(step, guard.reason or "the loss is not finite")
    else:
        guard.applied(step)
    return not refused


def usual(guard: Guard, count: int, first: int = 0) -> None:
    for step in range(first, first + count):
        assert train(guard, step, 2.0 + 0.1 * (step % 3), 1.0 + 0.05 * (step % 5))


@pytest.mark.parametrize(
    ("loss", "norm", "text"),
    [
        (9.0, 1.0, "the loss 9 is 4.3 times the usual 2.1"),
        (2.1, 8.0, "the gradient norm 8 is 7.3 times the usual 1.1"),
    ],
)
def test_a_spike_is_skipped_and_named(loss: float, norm: float, text: str) -> None:
    judge = guard(on_spike="skip")
    usual(judge, 30)
    assert not train(judge, 30, loss, norm)
    assert judge.reason == text
    assert judge.state.bad_steps == [30]
    assert train(judge, 31, 2.1)
    assert not judge.must_rewind


def test_a_spike_is_only_logged_by_default() -> None:
    judge = guard()
    usual(judge, 30)
    assert train(judge, 30, 9.0)
    assert "the usual" in judge.reason
    assert judge.state.bad_steps == []
    assert max(judge.state.losses) < 3  # no example of what is usual


def test_falling_losses_and_the_first_steps_are_no_spikes() -> None:
    judge = guard(on_spike="skip")
    for step, loss in enumerate((9.0, 1.0, 50.0, 2.0)):
        assert train(judge, step, loss)
    judge = guard(on_spike="skip")
    usual(judge, 30)
    assert train(judge, 30, 0.01, 0.01)


def test_a_constant_loss_has_room_to_move() -> None:
    judge = guard(on_spike="skip")
    for step in range(30):
        assert train(judge, step, 2.0)
    assert train(judge, 30, 2.2)
    assert not train(judge, 31, 4.0)


def test_too_many_bad_steps_in_a_window_ask_for_a_rewind() -> None:
    judge = guard(max_skipped=2)
    for step in (0, 20, 35):
        train(judge, step, float("nan"))
        assert not judge.must_rewind, step  # step 0 has left the window at step 35
    train(judge, 36, float("inf"))
    assert judge.must_rewind


def test_after_a_rewind_the_images_since_the_checkpoint_are_left_out() -> None:
    judge = guard(max_skipped=0, max_rewinds=2)
    usual(judge, 100)
    saved = GuardState(losses=list(judge.state.losses), norms=list(judge.state.norms))
    usual(judge, 18, 100)
    train(judge, 118, float("nan"))
    judge.rewound(saved, from_step=118, to_step=100)
    assert judge.state.left_out == [[100, 118]]
    assert judge.state.shift == 19  # step 100 trains on the images of step 119
    assert not judge.must_rewind
    assert not judge.gives_up
    # A second one leaves out what was not left out yet.
    train(judge, 103, float("nan"))
    judge.rewound(saved, from_step=103, to_step=100)
    assert judge.state.left_out[0] == [100, 118]
    assert judge.state.left_out[-1][1] == 122
    assert judge.gives_up


def test_a_window_of_good_steps_forgives_earlier_rewinds() -> None:
    judge = guard(GuardState(rewinds=2, bad_steps=[5]), max_rewinds=2)
    assert judge.gives_up
    usual(judge, 29, 6)
    assert judge.gives_up
    usual(judge, 1, 35)
    assert not judge.gives_up


def test_the_first_bad_step_of_a_window_is_captured_a_few_times() -> None:
    judge = guard()
    wanted = [step for step in range(0, 300, 10) if judge.wants_capture(step)]
    assert wanted == [0, 30, 60]
