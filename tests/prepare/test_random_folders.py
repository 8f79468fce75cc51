"""Random folder trees: what is prepared equals an independent reference, or it stops with a path.

The reference knows what each tree was built from: it plans classes, splits and counts first and
then writes them down as people do, with other names, links, litter, archives and formats.
"""

from __future__ import annotations

import io
import os
import random
import unicodedata
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from PIL import Image

from pipeline.config.schema import DatasetConfig
from pipeline.data.dataset import open_dataset
from pipeline.errors import DataError
from pipeline.sources.inspection import inspect_source
from tests.data.small_datasets import jpeg, picture
from tests.prepare.people import write
from tests.prepare.results import description
from tests.prepare.source_folders import prepare, write_tar

TREES = 60
SPLIT_NAMES = {
    "train": ["train", "Train", "training", "TRAINING_SET", "train_images", "seg_train"],
    "validation": ["val", "Val", "valid", "validation", "dev", "Eval", "hold-out", "val_images"],
    "test": ["test", "Testing", "test_set", "TEST", "seg_test"],
}
CLASS_NAMES = ["caf\u00e9", "n01440764", "big cat", "tree_frog", "Z\u00fcrich", "07", "rose", "ox"]
FORMATS = [("JPEG", ".jpg"), ("PNG", ".png"), ("WEBP", ".webp"), ("BMP", ".bmp"), ("JPEG", "")]
LITTER = [".DS_Store", "Thumbs.db", "._p.jpg", "@eaDir/p/t.jpg", "notes.txt", "README"]
# What makes a tree that nobody can understand without the user: it has to stop.
AMBIGUITIES = ["class called like a split", "class without training images", "broken annotations"]


@dataclass
class Tree:
    """A tree as it was planned: images by class, by split; '' where nothing is divided."""

    images: dict[str, Counter[str]] = field(default_factory=dict)
    must_stop: bool = False
    content: int = 0

    def image(self, choices: random.Random) -> tuple[str, bytes]:
        """A new image and the ending of its name."""
        self.content += 1
        form, ending = choices.choice(FORMATS)
        if form == "JPEG":
            return ending, jpeg(self.content, 40, 32)
        out = io.BytesIO()
        Image.fromarray(picture(self.content, 40, 32)).save(out, form)
        return ending, out.getvalue()


def build(root: Path, seed: int) -> Tree:
    """Write a random tree and return its plan."""
    choices = random.Random(seed)
    tree = Tree()
    splits = choices.choice([[""], ["train"], ["train", "validation"], list(SPLIT_NAMES)])
    if splits == ["train", "validation"] and choices.random() < 0.3:
        splits = ["train", "test"]  # test stands in for the missing validation split
    classes = choices.sample(CLASS_NAMES, choices.randint(2, 5))
    as_tars = choices.random() < 0.3
    for split in splits:
        folder = root / choices.choice(SPLIT_NAMES[split]) if split else root
        for name in classes:
            count = choices.randint(3, 6)
            tree.images.setdefault(split, Counter())[name] = count
            spelled = unicodedata.normalize(choices.choice(["NFC", "NFD"]), name)
            _write_class(tree, choices, folder / spelled, count, as_tars=as_tars)
    if choices.random() < 0.3:
        _make_unclear(root, choices, tree, splits, classes)
    if choices.random() < 0.4:
        write(root / "__MACOSX" / "x" / "._a.jpg")
    return tree


def _write_class(
    tree: Tree, choices: random.Random, path: Path, count: int, *, as_tars: bool
) -> None:
    """Write the images of a class as a folder, a link to one, or a tar."""
    pictures = [tree.image(choices) for _ in range(count)]
    depth = choices.choice(["", "", "images/", "a/b/"])
    files = {f"{depth}p{i}{ending}": data for i, (ending, data) in enumerate(pictures)}
    if choices.random() < 0.4:
        files |= dict.fromkeys(choices.sample(LITTER, 2), b"litter")
    if as_tars:
        write_tar(path.with_name(f"{path.name}.tar"), files)
        return
    place = path
    if choices.random() < 0.25:
        place = path.parents[2] / "elsewhere" / f"{tree.content}-{path.name}"
        path.parent.mkdir(parents=True, exist_ok=True)
        os.symlink(place, path)
    for name, data in files.items():
        write(place / name, data)


def _make_unclear(
    root: Path, choices: random.Random, tree: Tree, splits: list[str], classes: list[str]
) -> None:
    kind = choices.choice(AMBIGUITIES)
    tree.must_stop = True
    if kind == "class called like a split" and splits == [""]:
        write(root / choices.choice(["test", "Eval", "dev"]) / "p.jpg", jpeg(9001, 40, 32))
    elif kind == "class without training images" and len(splits) > 1:
        folder = next(path for path in root.iterdir() if "rain" not in path.name.lower())
        write(folder / "unicorn" / "p.jpg", jpeg(9002, 40, 32))
        write_tar(folder / "unicorn.tar", {"p.jpg": jpeg(9002, 40, 32)})
    elif kind == "broken annotations" and splits == ["train"]:
        write(root / "val" / "images" / "p.jpg", jpeg(9003, 40, 32))
        write(root / "val" / "val_annotations.txt", b"other.jpg\trose\t0\n")
    else:
        tree.must_stop = False


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(TREES))
def test_a_random_tree_is_prepared_as_planned_or_stops_with_a_path(
    seed: int, tmp_path: Path
) -> None:
    root = tmp_path / "above" / "in"
    root.mkdir(parents=True)
    tree = build(root, seed)
    config = DatasetConfig(root=str(root), min_side=16)
    try:
        inspected = inspect_source(config)
    except DataError as error:
        assert tree.must_stop, f"seed {seed}: {error.message}"
        assert str(root) in error.place
        return
    assert not tree.must_stop, f"seed {seed}: should have stopped"
    try:
        prepare(root, tmp_path / "out", validation_fraction=0.3)
    except DataError as error:
        # Chance may hold out none of so few images.
        assert "no image is left for the validation split" in error.cause, f"seed {seed}"
        assert len(tree.images) == 1
        assert error.place == str(root)
        return
    classes = sorted({name for images in tree.images.values() for name in images})
    assert open_dataset(tmp_path / "out").classes == classes, f"seed {seed}"
    splits = {
        name: dict(zip(classes, split["images_by_class"], strict=True))
        for name, split in description(tmp_path / "out")["splits"].items()
    }
    wanted = {name: dict(images) for name, images in tree.images.items()}
    if wanted.keys() == {"train", "test"}:
        wanted = {"train": wanted["train"], "validation": wanted["test"]}
    if len(wanted) == 1:  # images were held out: every class keeps some, none is lost
        (whole,) = wanted.values()
        held_out = splits.get("validation", {})
        assert all(splits["train"].values()), f"seed {seed}"
        assert {name: splits["train"][name] + held_out.get(name, 0) for name in whole} == whole
    else:
        assert splits == wanted, f"seed {seed}"
    trained = tree.images.get("train", tree.images.get("", Counter()))
    assert (inspected.classes, inspected.has_validation) == (len(classes), len(wanted) > 1)
    assert inspected.images == trained.total(), f"seed {seed}"
