"""The display: plain lines in a pipe, a live bar on a terminal, both fed from the event log."""

from __future__ import annotations

import io
from pathlib import Path

from rich.console import Console

from pipeline.layout import RunDir
from pipeline.monitor.console import Display, DisplayFeed, polled_in_background
from pipeline.monitor.recorder import Recorder


class FakeClock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def _display(*, terminal: bool = False) -> tuple[Display, io.StringIO, FakeClock]:
    out = io.StringIO()
    clock = FakeClock()
    console = Console(file=out, force_terminal=terminal, width=120, color_system=None)
    return Display(console, interval=10.0, clock=clock), out, clock


def test_a_pipe_gets_plain_lines_at_intervals_with_the_time_left(tmp_path: Path) -> None:
    display, out, clock = _display()
    feed = DisplayFeed(RunDir(tmp_path).events("pretrain"), display)
    recorder = Recorder(RunDir(tmp_path), "pretrain")
    with display.stage("pretrain"):
        for step in range(1, 41):
            recorder.step(
                step, 40, 0, {"loss/total": 5.0 - step / 10, "throughput/images_per_s": 1234.5}
            )
            clock.now += 1.0
            feed.poll()
        recorder.evaluation(40, {"accuracy/top1": 0.625, "accuracy/top5": 0.9})
        recorder.message("one step skipped", "warning")
        feed.poll()
    lines = out.getvalue().splitlines()
    assert lines[0] == "pretrain 1/40  epoch 1  1,234.5 images/s  loss 4.9000"
    assert lines[1] == "pretrain 11/40  epoch 1  1,234.5 images/s  loss 3.9000  0:00:29 left"
    assert lines[-3:] == [
        "pretrain 40/40  epoch 1  1,234.5 images/s  loss 1.0000",
        "evaluation after step 40: top1 0.625  top5 0.9",
        "warning: one step skipped",
    ]
    assert len(lines) == 7
    assert feed.highest_step == 40


def test_a_terminal_gets_a_bar(tmp_path: Path) -> None:
    display, out, _ = _display(terminal=True)
    recorder = Recorder(RunDir(tmp_path), "finetune")
    feed = DisplayFeed(RunDir(tmp_path).events("finetune"), display)
    with display.stage("finetune"), polled_in_background(feed, interval=0.01):
        recorder.step(1, 3, 0, {"loss/total": 2.0})
    assert "1/3" in out.getvalue()


def test_events_with_tags_of_an_older_version_are_shown(tmp_path: Path) -> None:
    display, out, _ = _display()
    events = RunDir(tmp_path).events("pretrain")
    events.parent.mkdir()
    feed = DisplayFeed(events, display)
    events.write_text(
        '{"kind":"start","step":0,"time":1.0}\n'
        '{"kind":"step","step":1,"time":2.0,"total":2,"scalars":'
        '{"loss/total":3.5,"reversible/repeated_steps":1.0,"reversible/largest_value":2.0}}\n'
    )
    with display.stage("pretrain"):
        feed.poll()
    assert out.getvalue() == "pretrain 1/2  epoch 1  loss 3.5000\n"


def test_square_brackets_in_messages_are_not_markup() -> None:
    display, out, _ = _display()
    with display.stage("prepare"):
        display.log("class [red]n0[/red] has no images")
        display.progress("[bold]x", 1, 1)
    assert out.getvalue().splitlines() == [
        "class [red]n0[/red] has no images",
        "prepare: [bold]x 1/1",
    ]
