"""TensorBoard's own reader reads the recorder's files; an unwritable directory is no error."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import IMAGES, EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2
from tensorboard.summary.writer import event_file_writer

from pipeline.layout import RunDir
from pipeline.monitor import tags
from pipeline.monitor.events import read_events
from pipeline.monitor.recorder import Recorder
from pipeline.monitor.tensorboard import grid


@pytest.fixture(autouse=True)
def counted_from_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    """Number this test's event files from 0, whatever earlier tests wrote.

    Files of the same second are read in the order of their names, and ".10" sorts before ".9".
    """
    monkeypatch.setattr(event_file_writer, "_global_uid", event_file_writer.AtomicCounter(0))


def _board(run: Path) -> EventAccumulator:
    accumulator = EventAccumulator(str(run / "tensorboard" / "pretrain"), size_guidance={IMAGES: 0})
    accumulator.Reload()
    return accumulator


def _train(run: Path, first: int, last: int) -> None:
    recorder = Recorder(RunDir(run), "pretrain", resume_step=first)
    for step in range(first + 1, last + 1):
        recorder.step(
            step, 6, 0, {"loss/total": 10.0 * first + step, "loss/position_0/classification": 1.0}
        )
    recorder.evaluation(last, {"accuracy/top1": 0.5})
    recorder.images("reconstruction", last, np.full((3, 4, 5, 3), 7, np.uint8))
    recorder.hparams({"base_lr": 1e-3, "recipe": "tiny"}, {"accuracy/top1": 0.5})
    recorder.close()


def test_tensorboard_reads_scalars_images_hparams_and_layout(tmp_path: Path) -> None:
    _train(tmp_path, 0, 4)
    board = _board(tmp_path)
    assert [(point.step, point.value) for point in board.Scalars("loss/total")] == [
        (1, 1.0),
        (2, 2.0),
        (3, 3.0),
        (4, 4.0),
    ]
    image = board.Images("reconstruction")[0]
    assert (image.width, image.height) == (15, 4)
    assert board.PluginTagToContent("custom_scalars")
    assert board.PluginTagToContent("hparams")
    assert {path.name for path in (tmp_path / "tensorboard").iterdir()} == {"pretrain"}


def test_the_layout_has_exactly_one_chart_per_metric(tmp_path: Path) -> None:
    _train(tmp_path, 0, 1)
    config = _board(tmp_path).Tensors("custom_scalars__config__")[0].tensor_proto
    layout = layout_pb2.Layout.FromString(config.string_val[0])
    patterns = [
        re.compile(pattern)
        for category in layout.category
        for chart in category.chart
        for pattern in chart.multiline.tag
    ]
    metrics = [value for name, value in vars(tags).items() if name.isupper()]
    metrics += [tags.classification_loss(12), tags.reconstruction_loss(3)]
    metrics.remove(tags.SKIPPED_STEPS)  # shown in the list of all scalars only
    matches = {tag: sum(bool(pattern.fullmatch(tag)) for pattern in patterns) for tag in metrics}
    assert matches == dict.fromkeys(metrics, 1)


def test_a_resumed_run_replaces_later_steps(tmp_path: Path) -> None:
    _train(tmp_path, 0, 4)
    _train(tmp_path, 2, 6)
    points = [(point.step, point.value) for point in _board(tmp_path).Scalars("loss/total")]
    assert points == [(1, 1.0), (2, 2.0), (3, 23.0), (4, 24.0), (5, 25.0), (6, 26.0)]
    steps = [
        event.scalars["loss/total"]
        for event in read_events(RunDir(tmp_path).events("pretrain"))
        if event.kind == "step"
    ]
    assert steps == [1.0, 2.0, 23.0, 24.0, 25.0, 26.0]


def test_an_unwritable_tensorboard_directory_costs_one_warning_only(
    tmp_path: Path,
) -> None:
    (tmp_path / "tensorboard").write_text("a file where the directory should be")
    _train(tmp_path, 0, 3)
    events = read_events(RunDir(tmp_path).events("pretrain"))
    assert [event.level for event in events if event.kind == "message"] == ["warning"]
    assert [event.step for event in events if event.kind == "step"] == [1, 2, 3]


def test_grid_tiles_row_by_row() -> None:
    images = np.arange(3, dtype=np.uint8)[:, None, None, None] * np.ones((1, 2, 2, 3), np.uint8)
    tiled = grid(images, columns=2)
    assert tiled.shape == (4, 4, 3)
    assert tiled[::2, ::2, 0].tolist() == [[0, 1], [2, 0]]
