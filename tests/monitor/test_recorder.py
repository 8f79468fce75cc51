"""TensorBoard's own reader reads the recorder's files; an unwritable directory is no error."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import IMAGES, EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2
from tensorboard.plugins.hparams.metadata import (
    EXPERIMENT_TAG,
    SESSION_START_INFO_TAG,
    parse_experiment_plugin_data,
    parse_session_start_info_plugin_data,
)
from tensorboard.summary.writer import event_file_writer

from pipeline.layout import RunDir
from pipeline.monitor import tags
from pipeline.monitor.events import read_events
from pipeline.monitor.recorder import Recorder


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
    recorder.image("reconstruction", last, np.full((4, 15, 3), 7, np.uint8))
    recorder.hparams({"base_lr": 1e-3, "recipe": "tiny"}, ["accuracy/top1"])
    recorder.close()


def test_tensorboard_reads_scalars_images_hparams_and_layout(tmp_path: Path) -> None:
    _train(tmp_path, 0, 4)
    board = _board(tmp_path)
    assert [(point.step, point.value) for point in board.Scalars("loss_pretrain/total")] == [
        (1, 1.0),
        (2, 2.0),
        (3, 3.0),
        (4, 4.0),
    ]
    image = board.Images("reconstruction")[0]
    assert (image.width, image.height) == (15, 4)
    assert board.PluginTagToContent("custom_scalars")
    assert {path.name for path in (tmp_path / "tensorboard").iterdir()} == {"pretrain"}


def test_hyperparameters_stand_beside_metrics_that_are_written_once(tmp_path: Path) -> None:
    _train(tmp_path, 0, 4)
    board = _board(tmp_path)
    contents = board.PluginTagToContent("hparams")
    session = parse_session_start_info_plugin_data(contents[SESSION_START_INFO_TAG])
    assert session.hparams["base_lr"].number_value == 1e-3
    experiment = parse_experiment_plugin_data(contents[EXPERIMENT_TAG])
    assert [metric.name.tag for metric in experiment.metric_infos] == ["accuracy/top1"]
    assert [point.step for point in board.Scalars("accuracy/top1")] == [4]


def _charts(board: EventAccumulator) -> dict[str, list[re.Pattern[str]]]:
    """The patterns of each chart in the tab Custom Scalars: {"group: title": patterns}."""
    config = board.Tensors("custom_scalars__config__")[0].tensor_proto
    layout = layout_pb2.Layout.FromString(config.string_val[0])
    return {
        f"{category.title}: {chart.title}": [re.compile(tag) for tag in chart.multiline.tag]
        for category in layout.category
        for chart in category.chart
    }


def _chart_of(tag: str, charts: dict[str, list[re.Pattern[str]]]) -> str:
    """The one chart that shows a tag."""
    # As TensorBoard does: from the beginning of the tag, not necessarily to its end.
    (title,) = [title for title, patterns in charts.items() if any(p.match(tag) for p in patterns)]
    return title


def test_the_layout_has_exactly_one_chart_per_metric(tmp_path: Path) -> None:
    _train(tmp_path, 0, 1)
    charts = _charts(_board(tmp_path))
    metrics = [
        value for name, value in vars(tags).items() if name.isupper() and isinstance(value, str)
    ]
    metrics += [tags.classification_loss(12), tags.reconstruction_loss(3), tags.accuracy("top5")]
    metrics += ["accuracy/test_top1", "accuracy/test_top5"]
    metrics += [tags.group_rate(0), tags.goodput_part("data_wait")]
    metrics += [tags.smallest_alpha(0), tags.largest_alpha(11), tags.headroom(7)]
    for part in ("stem", "column_12", "heads"):
        metrics += [tags.gradient_norm(part), tags.weight_norm(part), tags.update_norm(part)]
    shown = {_chart_of(tags.of_stage(tag, "finetune"), charts) for tag in metrics}
    # The charts of the other stages' losses are the only ones that are left.
    others = {title for title in charts if title.startswith(("Loss of pretr", "Evaluation"))}
    assert set(charts) - shown == others
    assert len(others) == 5


def test_a_stage_that_the_job_lacks_has_no_empty_charts(tmp_path: Path) -> None:
    Recorder(RunDir(tmp_path), "pretrain", trained=["pretrain"]).close()
    groups = {title.partition(":")[0] for title in _charts(_board(tmp_path))}
    assert "Loss of pretraining" in groups
    assert "Loss of fine-tuning" not in groups


def test_losses_of_stages_and_kinds_of_accuracy_have_charts_of_their_own(tmp_path: Path) -> None:
    _train(tmp_path, 0, 1)
    charts = _charts(_board(tmp_path))
    apart = [
        tags.of_stage(tags.LOSS, "pretrain"),
        tags.of_stage(tags.LOSS, "finetune"),
        tags.of_stage("loss/test", "evaluate"),
        tags.TOP1,
        tags.accuracy("top5"),
        tags.TRAIN_TOP1,
        tags.SKIPPED_STEPS,
    ]
    assert len({_chart_of(tag, charts) for tag in apart}) == len(apart)
    # The split that the evaluate stage reports is compared with the curve of training.
    assert _chart_of("accuracy/test_top1", charts) == _chart_of(tags.TOP1, charts)


def test_a_resumed_run_replaces_later_steps(tmp_path: Path) -> None:
    _train(tmp_path, 0, 4)
    _train(tmp_path, 2, 6)
    points = [
        (point.step, point.value) for point in _board(tmp_path).Scalars("loss_pretrain/total")
    ]
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
