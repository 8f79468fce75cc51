"""The script that makes the pictures of README: from a terminal, and from TensorBoard files."""

from __future__ import annotations

import importlib.util
import sys
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from rich.text import Text

from pipeline.layout import RunDir
from pipeline.monitor import tags
from pipeline.monitor.recorder import Recorder
from tests.docs.markdown import DOCUMENTS, ROOT, links

SCRIPT = ROOT / "docs" / "make_pictures"
LIVE = """
import time
from rich.console import Console
from rich.live import Live
console = Console()
with Live("first 1/2", console=console, transient=True, refresh_per_second=50) as live:
    console.print("[red]a message")
    time.sleep(0.1)
    live.update("second\\n2/2")
    time.sleep(0.1)
console.print("the end")
"""


@pytest.fixture(scope="module")
def script() -> ModuleType:
    loader = SourceFileLoader("make_pictures", str(SCRIPT))
    spec = importlib.util.spec_from_loader("make_pictures", loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module


def test_every_picture_of_the_documents_is_made_by_the_script() -> None:
    pictures = {
        Path(target).name
        for document in DOCUMENTS
        for target in links(document)
        if target.endswith((".svg", ".png"))
    }
    files = {path.name for path in (ROOT / "docs").iterdir() if path.suffix in (".svg", ".png")}
    assert files == pictures
    text = SCRIPT.read_text()
    assert not {name for name in pictures if f'"{name}"' not in text}


def test_a_recording_shows_what_stays_on_the_terminal(script: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "live.py").write_text(LIVE)
    shown = script.record([sys.executable, "live.py"], tmp_path)
    # The live lines have been erased.
    command = f"$ {sys.executable} live.py"
    assert Text.from_ansi(shown).plain.splitlines() == [command, "a message", "the end"]
    svg = script.terminal_svg(shown, "title")
    assert "a&#160;message" in svg
    assert "http" not in svg.replace("http://www.w3.org/", "").replace("https://www.textualize", "")


def test_a_long_recording_says_how_many_lines_it_leaves_out(script: ModuleType) -> None:
    lines = [f"line {number}" for number in range(40)]
    shown = Text.from_ansi(script.abridged("\n".join(lines))).plain.splitlines()
    assert shown == [*lines[:10], "... 12 more lines", *lines[-18:]]
    assert script.abridged("\n".join(lines[:28])) == "\n".join(lines[:28])


def test_a_recording_of_a_failed_command_is_refused(script: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="ended with 3"):
        script.record([sys.executable, "-c", "raise SystemExit(3)"], tmp_path)


def test_the_screen_follows_the_cursor_and_refuses_unknown_sequences(script: ModuleType) -> None:
    screen = script.Screen(columns=4)
    screen.feed("abcdef\r\nxy\r\x1b[2K\x1b[1AEF\r\n\x1b[1mz")
    assert Text.from_ansi(screen.ansi()).plain == "abcd\nEF\nz"
    with pytest.raises(ValueError, match="unknown escape sequence"):
        screen.feed("\x1b[5;5H")


def test_curves_and_predictions_are_those_of_the_tensorboard_files(
    script: ModuleType, tmp_path: Path
) -> None:
    run_dir = RunDir(tmp_path)
    for stage, first in (("pretrain", 8.0), ("finetune", 2.0)):
        recorder = Recorder(run_dir, stage)
        for step in (1, 2, 3):
            recorder.step(step, 3, 1, {tags.LOSS: first / 2**step, tags.LEARNING_RATE: 0.1})
        recorder.evaluation(3, {tags.TOP1: 0.5})
        recorder.image("predictions", 3, np.full((2, 2, 3), 7, np.uint8))
        recorder.close()
    svg = script.curves_svg(run_dir)
    for title in ("Loss of pretraining", "Loss of fine-tuning", "Top-1", "Learning rate"):
        assert f">{title}" in svg
    assert "Top-5" not in svg  # no such metric in this run
    assert svg.count("<svg") == 1 + 4
    board = script.board(run_dir, "pretrain")
    assert script.points(board, "loss_pretrain/total") == [(1, 4.0), (2, 2.0), (3, 1.0)]
    assert script.predictions_png(run_dir).startswith(b"\x89PNG")
    with pytest.raises(SystemExit, match="no TensorBoard files with predictions"):
        script.predictions_png(RunDir(tmp_path / "other"))
