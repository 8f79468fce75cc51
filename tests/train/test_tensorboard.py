"""What TensorBoard shows of a small job: read from the event files of its stages."""

from __future__ import annotations

import io
from dataclasses import dataclass

import numpy as np
import pytest
import torch
import yaml
from numpy.typing import NDArray
from PIL import Image as Pillow
from PIL import ImageDraw, ImageFont
from tensorboard.backend.event_processing.event_accumulator import IMAGES, EventAccumulator
from tensorboard.plugins.hparams.metadata import (
    EXPERIMENT_TAG,
    SESSION_START_INFO_TAG,
    parse_experiment_plugin_data,
    parse_session_start_info_plugin_data,
)

from pipeline.config.schema import Job
from pipeline.data.augment import EvalTransform
from pipeline.data.dataset import PreparedDataset, open_dataset
from pipeline.data.device import DeviceAugment
from pipeline.data.loader import TrainLoader
from pipeline.data.order import order_of
from pipeline.data.sheet import (
    BACKGROUND,
    CAPTION_HEIGHT,
    GAP,
    GREEN,
    GREY,
    HEADER_HEIGHT,
    LABEL_WIDTH,
    RED,
    Color,
)
from pipeline.evaluate.network import load_network
from pipeline.layout import RunDir
from pipeline.monitor import tags
from pipeline.monitor.goodput import PARTS
from tests.train import processes, staging

STAGES = ("pretrain", "finetune", "evaluate")
JOB = staging.job(pretrain={"max_steps": 8}, finetune={"max_steps": 4})
KINDS = ("gradient", "weight", "update")  # of norms
SIDE = 128  # of a shown image: those of 32 pixels four times, those of 64 twice as large
Pixels = NDArray[np.uint8]


@dataclass(frozen=True)
class Trained:
    """A run of the three stages, and the metrics of the last one."""

    run_dir: RunDir
    evaluated: dict[str, float]

    def board(self, stage: str) -> EventAccumulator:
        folder = str(self.run_dir.tensorboard(stage))
        return EventAccumulator(folder, size_guidance={IMAGES: 0}).Reload()

    def picture(self, stage: str, tag: str, number: int = -1) -> Pixels:
        encoded = self.board(stage).Images(tag)[number].encoded_image_string
        return np.asarray(Pillow.open(io.BytesIO(encoded)))

    @property
    def data(self) -> PreparedDataset:
        return open_dataset(self.run_dir.dataset(staging.DATASET))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    run_dir = staging.prepared_run(tmp_path_factory.mktemp("shown"))
    for stage in ("pretrain", "finetune"):
        (metrics,) = staging.run_stage(run_dir, 1, JOB, stage)
        assert isinstance(metrics, dict), metrics
    (metrics,) = processes.run(run_dir.logs / "output", 1, staging.evaluate, JOB, run_dir)
    assert isinstance(metrics, dict), metrics
    return Trained(run_dir, metrics)


def tile(picture: Pixels, row: int, column: int, *, left: int = GAP, lines: int = 2) -> Pixels:
    """One image of a picture and the captions below it."""
    height = SIDE + lines * CAPTION_HEIGHT
    top = HEADER_HEIGHT + row * (height + GAP)
    x = left + column * (SIDE + GAP)
    return picture[top : top + height, x : x + SIDE]


def assert_text(pixels: Pixels, text: str, size: int, color: Color) -> None:
    """The top left corner of ``pixels`` shows the text."""
    font = ImageFont.load_default(size)
    expected = Pillow.new("RGB", (SIDE, size + 3), BACKGROUND)
    ImageDraw.Draw(expected).text((0, 0), text, color, font)
    assert np.array_equal(pixels[: size + 3], np.asarray(expected)), text


def test_every_metric_is_in_a_group_with_others_of_its_kind(trained: Trained) -> None:
    training = {"optim", "throughput", "memory", "reversible", "data", "utilisation"}
    training |= {"goodput", "goodput_parts", "gradient_norms", "weight_norms", "update_norms"}
    training |= {"alpha", "headroom"}
    machine: dict[str, set[str]] = {
        "pretrain": training,
        "finetune": training | {"layer_rates"},
        "evaluate": set(),
    }
    for stage in STAGES:
        scalars = trained.board(stage).Tags()["scalars"]
        groups = {tag.partition("/")[0] for tag in scalars}
        expected = {f"loss_{stage}", "accuracy"} | machine[stage]
        assert groups == expected, stage
        assert all("/" in tag for tag in scalars), stage


def test_all_metrics_of_a_training_are_shown(trained: Trained) -> None:
    board = trained.board("pretrain")
    expected = {
        "loss_pretrain/total",
        "loss_pretrain/validation",
        "accuracy/train_top1",
        "accuracy/top1",
        "optim/lr",
        "optim/grad_norm",
        "optim/skipped_steps",
        "throughput/images_per_s",
        "throughput/data_wait_share",
        *(f"memory/{part}_mib" for part in ("rss", "weights", "optimizer", "state", "peak")),
        "utilisation/mfu",
        "utilisation/hfu",
        "goodput/share",
        "goodput/restarts",
        *(f"goodput_parts/{part}" for part in PARTS),
        *(f"{kind}_norms/column_{t}" for t in range(4) for kind in KINDS),
        *(f"{kind}_norms/{part}" for part in ("stem", "heads") for kind in KINDS),
        *(f"alpha/{kind}_column_{t}" for t in range(4) for kind in ("smallest", "largest")),
        *(f"headroom/column_{t}" for t in range(4)),
        "data/replaced_samples",
        "reversible/mismatched_elements",
        "reversible/retried_steps",
        "reversible/max_abs",
        *(f"loss_pretrain/position_{i}/classification" for i in range(4)),
        *(f"loss_pretrain/position_{i}/reconstruction" for i in range(3)),
    }
    assert set(board.Tags()["scalars"]) == expected
    steps = [event.step for event in board.Scalars(tags.of_stage(tags.LOSS, "pretrain"))]
    assert steps == list(range(1, 9))
    assert all(event.value == 0 for event in board.Scalars(tags.MISMATCHED_ELEMENTS))


def test_the_resolved_job_is_shown_as_text(trained: Trained) -> None:
    for stage in STAGES:
        (event,) = trained.board(stage).Tensors("job/text_summary")
        text = event.tensor_proto.string_val[0].decode()
        assert text.startswith("```yaml\n")
        resolved = yaml.safe_load(text.strip("`\n").removeprefix("yaml"))
        assert Job.model_validate(resolved) == JOB, stage


def test_hyperparameters_of_every_stage_stand_beside_the_evaluation(trained: Trained) -> None:
    contents = {stage: trained.board(stage).PluginTagToContent("hparams") for stage in STAGES}
    sessions = {
        stage: parse_session_start_info_plugin_data(content[SESSION_START_INFO_TAG]).hparams
        for stage, content in contents.items()
    }
    assert sessions["pretrain"]["base_lr"].number_value == staging.PRETRAIN["base_lr"]
    assert sessions["finetune"]["layer_decay"].number_value == 0.8
    # The evaluated weights are those of fine-tuning.
    assert sessions["evaluate"] == sessions["finetune"]
    # TensorBoard takes the columns from one of the stages, so all must have the same.
    columns = {
        stage: [
            metric.name.tag
            for metric in parse_experiment_plugin_data(content[EXPERIMENT_TAG]).metric_infos
        ]
        for stage, content in contents.items()
    }
    assert columns["pretrain"] == columns["finetune"] == columns["evaluate"]
    # The values of a column are the last ones of the metric with that name.
    board = trained.board("evaluate")
    shown = {
        tag: board.Scalars(tag)[-1].value
        for tag in columns["evaluate"]
        if tag in board.Tags()["scalars"]
    }
    assert shown == pytest.approx(
        {
            "accuracy/top1": trained.evaluated["top1"],
            "loss_evaluate/validation": trained.evaluated["loss"],
        }
    )


def test_the_first_batch_is_shown_as_the_network_receives_it(trained: Trained) -> None:
    picture = trained.picture("pretrain", "augmented_batch")
    config = JOB.stages.pretrain
    assert config is not None
    data = trained.data
    with TrainLoader(
        data.split("train"),
        seed=JOB.seed,
        image_size=32,
        augment=config.augment,
        global_batch=16,
        micro_batch=16,
        order=order_of(config, data, JOB.seed),
    ) as loader:
        batch = next(iter(loader))
        augment = DeviceAugment(config.augment, staging.CLASSES, JOB.seed, train=True)
        inputs = augment(batch.images, batch.labels, batch.views, batch.positions, batch.epoch)
    pixels = (inputs.image01() * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    mixed = 0
    for number in range(16):
        shown = tile(picture, *divmod(number, 8))
        assert np.array_equal(shown[:SIDE:4, ::4], pixels[number])
        targets = zip(inputs.targets[number].tolist(), data.class_names, strict=True)
        shares = sorted(((share, name) for share, name in targets if share > 0.03), reverse=True)
        mixed += len(shares) > 1
        text = ", ".join(f"{share:.0%} {name}" for share, name in shares)
        assert_text(shown[SIDE + 3 :], text, 11, GREY)
        assert_text(shown[SIDE + CAPTION_HEIGHT :], f"row {batch.samples[number]}", 11, GREY)
    assert mixed  # or the test would not see an augmentation of pairs


@pytest.mark.parametrize("stage", ["finetune", "evaluate"])
def test_predictions_are_shown_with_classes_and_confidence(trained: Trained, stage: str) -> None:
    # The picture of fine-tuning shows the weights after its last step, which are evaluated.
    picture = trained.picture(stage, "predictions")
    split = trained.data.split("validation")
    names = trained.data.class_names
    network = load_network(JOB, trained.run_dir, "finetune", trained.data)
    transform = EvalTransform(64, 1.143)
    normalise = DeviceAugment(JOB.stages.pretrain.augment, staging.CLASSES, 0, train=False)
    pixels = np.empty((1, 64, 64, 3), np.uint8)
    count = 16 if stage == "finetune" else 5  # the first batch
    rights = 0
    for number in range(count):
        transform(split.image(number), pixels[0])
        none = torch.zeros(1, dtype=torch.int64)
        with torch.no_grad():
            output = network(normalise(torch.from_numpy(pixels), none, none, none, 0).images)
        confidence, best = output.logits[-1].softmax(dim=1).max(dim=1)
        shown = tile(picture, *divmod(number, 8))
        assert np.array_equal(shown[:SIDE:2, ::2], pixels[0])
        right = int(best) == split.label(number)
        rights += right
        verdict = "right" if right else "wrong"
        first = f"{verdict}, {float(confidence):.0%}: {names[int(best)]}"
        second = f"row {number}" if right else f"row {number}, is {names[split.label(number)]}"
        assert_text(shown[SIDE + 3 :], first, 11, GREEN if right else RED)
        assert_text(shown[SIDE + CAPTION_HEIGHT :], second, 11, GREY)
    assert 0 < rights < count or stage == "evaluate"


def test_reconstructions_are_shown_below_their_inputs_with_class_and_row(trained: Trained) -> None:
    picture = trained.picture("pretrain", "reconstructions")
    split = trained.data.split("validation")
    row_height = SIDE + CAPTION_HEIGHT + GAP
    assert picture.shape[0] == HEADER_HEIGHT + 4 * row_height
    pixels = np.empty((32, 32, 3), np.uint8)
    transform = EvalTransform(32, 1.143)
    for number in range(8):
        x = LABEL_WIDTH + number * (SIDE + GAP)
        assert_text(picture[HEADER_HEIGHT - 24 :, x : x + SIDE], f"row {number}", 13, GREY)
        transform(split.image(number), pixels)
        shown = tile(picture, 0, number, left=LABEL_WIDTH, lines=1)
        assert np.array_equal(shown[:SIDE:4, ::4], pixels)
        for position in range(1, 4):
            below = tile(picture, position, number, left=LABEL_WIDTH, lines=1)
            assert_text(below[SIDE + 3 :], trained.data.class_names[split.label(number)], 11, GREY)
            assert not np.array_equal(below[:SIDE:4, ::4], pixels)
