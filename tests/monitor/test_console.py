"""The display: plain lines in a pipe, a live bar on a terminal, both fed from the event log."""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import Literal

import pytest
from rich.console import Console

from pipeline.layout import RunDir
from pipeline.monitor.console import Display, DisplayFeed, polled_in_background
from pipeline.monitor.progress_line import LONGEST_BAR, SHORTEST_BAR
from pipeline.monitor.recorder import Recorder

CONTROL = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


class FakeClock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def _display(*, terminal: bool = False, width: int = 120) -> tuple[Display, io.StringIO, FakeClock]:
    out = io.StringIO()
    clock = FakeClock()
    # With colours, the empty part of the bar is drawn too.
    colours: Literal["standard"] | None = "standard" if terminal else None
    console = Console(file=out, force_terminal=terminal, width=width, color_system=colours)
    return Display(console, interval=10.0, clock=clock), out, clock


def test_a_pipe_gets_plain_lines_at_intervals_with_the_time_left(tmp_path: Path) -> None:
    display, out, clock = _display()
    feed = DisplayFeed(RunDir(tmp_path).events("pretrain"), display)
    recorder = Recorder(RunDir(tmp_path), "pretrain")
    with display.stage("pretrain"):
        for step in range(1, 41):
            recorder.step(
                step, 40, 1, {"loss/total": 5.0 - step / 10, "throughput/images_per_s": 1234.5}
            )
            clock.now += 1.0
            feed.poll()
        recorder.evaluation(40, {"accuracy/top1": 0.625, "accuracy/top5": 0.9})
        recorder.message("one step skipped", "warning")
        feed.poll()
    lines = out.getvalue().splitlines()
    assert lines[0] == "pretrain 1/40  epoch 1  loss 4.9000  1,234.5 images/s"
    assert lines[1] == "pretrain 11/40  epoch 1  loss 3.9000  1,234.5 images/s  0:00:29 left"
    assert lines[-3:] == [
        "pretrain 40/40  epoch 1  loss 1.0000  1,234.5 images/s",
        "evaluation after step 40: top-1 62.5%  top-5 90.0%",
        "warning: one step skipped",
    ]
    assert len(lines) == 7
    assert feed.highest_step == 40


def test_a_terminal_gets_a_bar(tmp_path: Path) -> None:
    display, out, _ = _display(terminal=True)
    recorder = Recorder(RunDir(tmp_path), "finetune")
    feed = DisplayFeed(RunDir(tmp_path).events("finetune"), display)
    with display.stage("finetune"), polled_in_background(feed, interval=0.01):
        recorder.step(1, 3, 1, {"loss/total": 2.0})
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
    assert out.getvalue() == "pretrain 1/2  loss 3.5000\n"


def test_square_brackets_in_messages_are_not_markup() -> None:
    display, out, _ = _display()
    with display.stage("prepare"):
        display.log("class [red]n0[/red] has no images")
        display.progress("[bold]x", 1, 1)
    assert out.getvalue().splitlines() == [
        "class [red]n0[/red] has no images",
        "prepare: [bold]x 1/1",
    ]


def screens(out: io.StringIO) -> list[str]:
    """Everything that the live line has shown, in order, without control sequences."""
    return [line.strip() for line in re.split(r"[\r\n]+", CONTROL.sub("", out.getvalue())) if line]


@pytest.mark.parametrize(
    ("width", "shown"),
    [
        (60, "epoch 3  loss 4.0000"),
        (80, "epoch 3  loss 4.0000  top-1 62.5%"),
        (120, "epoch 3  loss 4.0000  top-1 62.5%  1,234.5 images/s"),
    ],
)
def test_bar_count_and_time_left_stay_on_a_narrow_terminal(
    tmp_path: Path, width: int, shown: str
) -> None:
    display, out, clock = _display(terminal=True, width=width)
    feed = DisplayFeed(RunDir(tmp_path).events("pretrain"), display)
    recorder = Recorder(RunDir(tmp_path), "pretrain")
    with display.stage("pretrain"):
        recorder.evaluation(1, {"accuracy/top1": 0.625})
        for step in (1, 11):
            recorder.step(step, 40, 3, {"loss/total": 4.0, "throughput/images_per_s": 1234.5})
            clock.now += 10.0
            feed.poll()
    line = [line for line in screens(out) if "11/40" in line][-1]
    match = re.fullmatch(r"pretrain ([━╸╺]+) 11/40  0:00:29 left  (.*)", line)
    assert match is not None, line
    assert SHORTEST_BAR <= len(match[1]) <= LONGEST_BAR
    assert match[2] == shown
    assert len(line) < width


def test_a_long_label_is_shortened_before_the_bar_is() -> None:
    display, out, clock = _display(terminal=True, width=60)
    with display.stage("prepare"):
        for done in (1, 3):
            display.progress("own_images-wildflowers-of-2024: reading", done, 6, "7 rejected")
            clock.now += 10.0
    line = [line for line in screens(out) if "3/6" in line][-1]
    assert re.fullmatch(r"prepare: own_images-\w+… [━╸╺]{8} 3/6  0:00:15 left", line), line


@pytest.mark.parametrize(("compiles", "word"), [(False, "loading"), (True, "compiling")])
def test_a_word_stands_for_the_time_before_the_first_step(
    tmp_path: Path, compiles: bool, word: str
) -> None:
    display, out, clock = _display(terminal=True, width=80)
    events = RunDir(tmp_path).events("pretrain")
    with display.stage("pretrain"):
        feed = DisplayFeed(events, display, compiles=compiles)
        clock.now += 5.0
        display.log("a line, which redraws the one below it")
        Recorder(RunDir(tmp_path), "pretrain")
        feed.poll()
        clock.now += 65.0
        display.log("another line")
    shown = screens(out)
    assert not [line for line in shown if "0/0" in line]
    assert re.search(r"pretrain . starting  0:00:05", "\n".join(shown))
    assert re.search(rf"pretrain . {word}  0:01:05", "\n".join(shown))


def test_lines_beside_a_progress_on_standard_error_stay_on_standard_output(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """``predict IMAGES > file`` on a terminal: the file gets the lines, the terminal the bar."""
    display = Display(Console(stderr=True, force_terminal=True, width=80))
    with display.stage("predict"):
        print("a.jpg: rose 76.2%")
        display.progress("", 1, 2)
    captured = capsys.readouterr()
    assert captured.out == "a.jpg: rose 76.2%\n"
    assert "1/2" in captured.err
