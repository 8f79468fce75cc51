"""The words for states and metrics at the end of a run, and at the start of a stage."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from pipeline.orchestrate import summary
from pipeline.orchestrate.resume_policy import decide
from pipeline.orchestrate.run_state import StageRecord, State


@pytest.mark.parametrize(
    ("state", "seconds", "words"),
    [
        ("pending", 0.0, "not started"),
        ("pending", 3.0, "interrupted"),
        ("running", 0.0, "running"),
        ("failed", 3.0, "failed"),
        ("done", 3.0, "done"),
    ],
)
def test_a_state_has_words_for_a_person(state: State, seconds: float, words: str) -> None:
    assert StageRecord(state=state, seconds=seconds).in_words == words


def test_the_table_writes_states_and_metrics_as_the_log_does() -> None:
    console = Console(file=io.StringIO(), width=80)
    records = {
        "pretrain": StageRecord(
            state="done", seconds=61.2, metrics={"top1": 0.7621, "loss": 2.5, "images_per_s": 1234}
        ),
        "evaluate": StageRecord(),
    }
    console.print(summary.table(records))
    assert isinstance(console.file, io.StringIO)
    lines = [" ".join(line.split()) for line in console.file.getvalue().splitlines()]
    assert lines[1] == "pretrain done 0:01:01 top-1 76.2% loss 2.5000 1,234.0 images/s"
    assert lines[2] == "evaluate not started 0:00:00"


def test_a_first_start_is_announced_as_one() -> None:
    decision = decide(
        "prepare",
        StageRecord(),
        started_with=None,
        resolved={},
    )
    assert f"prepare: {decision.reason}" == "prepare: starting"
