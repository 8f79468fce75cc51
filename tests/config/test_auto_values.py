"""``auto``: values chosen from the images, each with a note that gives the reason."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.config import job_queries, machine
from pipeline.config.auto_rules import RULES, StageFacts
from pipeline.config.check import check
from pipeline.config.load import LoadedJob, load_job
from pipeline.config.schema import DatasetConfig, TrainConfig
from pipeline.errors import ConfigError, DataError
from pipeline.sources.inspection import inspect_source
from tests.config.jobs import ROOT
from tests.prepare.source_folders import class_tars, write_tar

OWN = ROOT / "jobs/own_images.yaml"


def image_file(width: int, height: int, kind: str = "JPEG") -> bytes:
    out = io.BytesIO()
    Image.fromarray(np.zeros((height, width, 3), np.uint8)).save(out, kind)
    return out.getvalue()


def folders(
    root: Path, classes: int, count: int, width: int = 200, height: int = 150, kind: str = "JPEG"
) -> Path:
    image = image_file(width, height, kind)
    for label in range(classes):
        folder = root / f"class {label}"
        folder.mkdir(parents=True)
        for number in range(count):
            (folder / f"{number}.{kind.lower()}").write_bytes(image)
    return root


def load_own(root: Path, *overrides: str) -> LoadedJob:
    loaded = load_job(OWN, [f"data.root={root}", "cluster.device=cpu", *overrides])
    check(loaded.job, machine.world_size(loaded.job.cluster), loaded.origins)
    return loaded


def pretrain_of(loaded: LoadedJob) -> TrainConfig:
    assert loaded.job.stages.pretrain is not None
    return loaded.job.stages.pretrain


def test_values_are_chosen_for_class_folders(tmp_path: Path) -> None:
    loaded = load_own(folders(tmp_path / "mine", 4, 100))
    pretrain = pretrain_of(loaded)
    assert loaded.job.model.stem_stride == 4
    assert pretrain.image_size == 96  # 150 pixels allow 128, the CPU budget does not
    assert pretrain.epochs == 100
    assert pretrain.warmup_epochs == 10
    assert pretrain.global_batch == 16  # 360 images: 22 steps per epoch
    assert pretrain.eval_every_epochs == 10
    assert pretrain.checkpoint_every_steps == 220
    assert (pretrain.augment.mixup, pretrain.augment.cutmix) == (0.2, 0.2)
    assert loaded.job.data["images"].validation_fraction == 0.1
    assert loaded.origins["stages.pretrain.epochs"].startswith("chosen: 360 training images")
    notes = "\n".join(loaded.notes)
    for part in (
        "data.images: 400 images of 4 classes (class folders, no validation split), median short "
        "side 150 pixels",
        "data.images.validation_fraction = 0.1: held out by content hash",
        "model.stem_stride = 4: 150 pixels, 96 or more",
        "stages.pretrain.image_size = 96: median short side 150 pixels",
        "stages.pretrain.epochs = 100: 360 training images",
        "stages.pretrain.global_batch = 16: 22 steps per epoch on 2 processes",
        "stages.pretrain.augment.mixup = 0.2: each image is shown 100 times",
    ):
        assert part in notes


@pytest.mark.parametrize(
    ("side", "stem_stride", "image_size"),
    [(32, 2, 32), (50, 2, 48), (95, 2, 80), (96, 4, 96), (500, 4, 96)],
)
def test_small_images_get_a_finer_stem_and_are_not_enlarged(
    tmp_path: Path, side: int, stem_stride: int, image_size: int
) -> None:
    loaded = load_own(folders(tmp_path / "mine", 2, 20, width=side, height=side))
    assert loaded.job.model.stem_stride == stem_stride
    assert pretrain_of(loaded).image_size == image_size


@pytest.mark.parametrize(
    ("side", "scale", "ratio", "padding"),
    [(32, (1, 1), (1, 1), 0.125), (80, (1, 1), (1, 1), 0.125), (96, (0.5, 1), (0.75, 1.3333), 0)],
)
def test_small_images_are_moved_and_larger_ones_cut(
    tmp_path: Path,
    side: int,
    scale: tuple[float, float],
    ratio: tuple[float, float],
    padding: float,
) -> None:
    loaded = load_own(folders(tmp_path / "mine", 2, 20, width=side, height=side))
    augment = pretrain_of(loaded).augment
    chosen = (augment.crop_scale, augment.crop_ratio, augment.crop_padding)
    assert chosen == (scale, ratio, padding)
    notes = [note for note in loaded.notes if "crop_scale" in note]
    assert notes[0].startswith(f"stages.pretrain.augment.crop_scale = {list(map(float, scale))}:")


def test_the_stem_follows_an_image_size_that_is_given(tmp_path: Path) -> None:
    root = folders(tmp_path / "mine", 2, 20, width=300, height=300)
    assert load_own(root, "stages.pretrain.image_size=48").job.model.stem_stride == 2


def test_many_images_are_shown_less_often_and_mixed_less(tmp_path: Path) -> None:
    """The time of a run is bounded: presentations, not epochs, are what it pays for."""
    shown = {}
    for images in (400, 2_000, 8_000, 30_000):
        facts = StageFacts(
            images=images,
            fewest_images=images,
            short_side=32,
            device="cpu",
            processes=2,
            finetune=False,
            stem_stride=2,
            image_size=32,
            epochs=1,
            global_batch=64,
        )
        epochs = int(RULES["epochs"](facts).value)
        shown[images] = (epochs, RULES["augment.mixup"](replace(facts, epochs=epochs)).value)
    assert shown == {400: (100, 0.2), 2_000: (83, 0.2), 8_000: (20, 0.0), 30_000: (5, 0.0)}
    assert RULES["augment.mixup"](replace(facts, epochs=300)).value == 0.8


@pytest.mark.parametrize(("classes", "count"), [(4, 10), (4, 3), (2, 3)])
def test_a_handful_of_images_is_enough_for_a_valid_job(
    tmp_path: Path, classes: int, count: int
) -> None:
    loaded = load_own(folders(tmp_path / "mine", classes, count))
    pretrain = pretrain_of(loaded)
    train_images = classes * count * 0.8
    assert pretrain.global_batch <= train_images
    if count < 5:
        # Which images are held out is decided by chance, but every class keeps one.
        assert pretrain.global_batch <= classes
        assert pretrain.augment.mixup == 0 or pretrain.global_batch >= 4
    assert job_queries.steps(pretrain, int(train_images)) >= 100


def test_a_validation_split_of_the_source_is_used(tmp_path: Path) -> None:
    loaded = load_own(
        class_tars(tmp_path / "mine", classes=5, count=20, validation=4), "cluster.processes=1"
    )
    assert (
        loaded.notes[0]
        == "data.images: 100 images of 5 classes (class tars, with a validation split), median "
        "short side 32 pixels"
    )
    pretrain = pretrain_of(loaded)
    assert (pretrain.image_size, pretrain.global_batch) == (32, 16)


def test_global_batch_divides_evenly_among_any_number_of_processes(tmp_path: Path) -> None:
    root = folders(tmp_path / "mine", 4, 100)
    for processes in (1, 2, 3, 8, 64):
        job = load_own(root, f"cluster.processes={processes}").job
        assert job.stages.pretrain.global_batch % (2 * processes) == 0


def test_more_is_held_out_of_few_images(tmp_path: Path) -> None:
    loaded = load_own(folders(tmp_path / "mine", 2, 10), "cluster.processes=1")
    assert loaded.job.data["images"].validation_fraction == 0.2


def test_values_set_by_the_user_are_kept(tmp_path: Path) -> None:
    loaded = load_own(
        folders(tmp_path / "mine", 2, 40),
        "stages.pretrain.epochs=7",
        "stages.pretrain.image_size=32",
        "data.validation_fraction=0.25",
    )
    pretrain = pretrain_of(loaded)
    assert (pretrain.epochs, pretrain.image_size) == (7, 32)
    assert loaded.job.data["images"].validation_fraction == 0.25
    assert not any(
        note.startswith(("stages.pretrain.epochs", "data.images.validation"))
        for note in loaded.notes
    )
    assert [note for note in loaded.notes if "stages.pretrain.global_batch = " in note]


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "BMP", "WEBP", "TIFF"])
def test_image_sizes_are_read_from_every_format(tmp_path: Path, kind: str) -> None:
    root = folders(tmp_path / "mine", 2, 3, width=90, height=70, kind=kind)
    source = inspect_source(DatasetConfig(root=str(root)))
    assert (source.layout, source.classes, source.images, source.short_side) == (
        "class_folders",
        2,
        6,
        70,
    )


def test_damaged_files_do_not_stop_the_inspection(tmp_path: Path) -> None:
    files = {
        "a.jpg": image_file(64, 48),
        "b.jpg": b"no image",
        "c.jpg": b"",
        "readme.txt": b"x",
        "d.png": image_file(64, 48, "PNG"),
    }
    write_tar(tmp_path / "cut.tar", files)
    whole = (tmp_path / "cut.tar").read_bytes()
    (tmp_path / "cut.tar").write_bytes(whole[:1500])
    write_tar(tmp_path / "whole.tar", files)
    (tmp_path / "nonsense.tar").write_bytes(b"\x01" * 3000)
    source = inspect_source(DatasetConfig(root=str(tmp_path)))
    assert (source.classes, source.short_side) == (3, 48)
    assert source.images in (4, 5)  # the cut tar counts as far as it can be read
    for name in ("bad", "worse"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x.jpg").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"none of 2 files .* can be read"):
        inspect_source(DatasetConfig(root=str(tmp_path), layout="class_folders"))


@pytest.mark.parametrize(
    ("prepare", "overrides", "message"),
    [
        (
            "",
            ["data.root="],
            "--set: data.images.root: no folder of images is given\n  -> --set data.root=DIR",
        ),
        (
            "",
            ["data.root=/not/there"],
            "--set: data.images.root: there is no folder /not/there"
            "\n  -> --set data.images.root=DIR",
        ),
        (
            "empty",
            [],
            "data.images.root: {root}: holds no images in a layout that is known; it has no files",
        ),
        (
            "folders",
            ["data.layout=class_tars"],
            "data.images.root: {root}: holds no tars; it has 100 files .jpeg",
        ),
        (
            "few",
            ["cluster.processes=3"],
            "stages.pretrain.global_batch: 2 training images are too few for 3 processes",
        ),
    ],
)
def test_unusable_source_is_refused(
    tmp_path: Path, prepare: str, overrides: list[str], message: str
) -> None:
    root = tmp_path / "mine"
    root.mkdir()
    if prepare in ("folders", "few"):
        folders(root, 2, 50 if prepare == "folders" else 1)
    with pytest.raises(ConfigError) as error:
        load_own(root, *overrides)
    assert message.format(root=root) in error.value.message


def test_missing_source_names_the_override_that_sets_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OWN_IMAGES", raising=False)
    with pytest.raises(
        ConfigError,
        match=r"own_images\.yaml:9: data\.images\.root: no folder of images is given"
        r"\n  -> --set data\.root=DIR",
    ):
        load_job(OWN)


def test_auto_uses_the_dataset_of_the_stage(tmp_path: Path) -> None:
    root = folders(tmp_path / "mine", 2, 40)
    both = f"data={{cats: {{root: {root}}}, dogs: {{root: {root}}}}}"
    with pytest.raises(
        ConfigError,
        match=r"stages\.pretrain\.data: 'auto' needs to know the dataset"
        r"\n  -> data: one of cats, dogs",
    ):
        load_job(OWN, [both])
    finetune = "stages.finetune={recipe: own_images_finetune, from: pretrain, data: dogs}"
    loaded = load_job(OWN, [both, "stages.pretrain.data=cats", finetune])
    assert [note.partition(":")[0] for note in loaded.notes if note.startswith("data.")] == [
        "data.cats",
        "data.dogs",
    ]
