"""From sources to datasets: layouts, splits, duplicates, hostile archives, and the same bytes whatever happens on the way."""

from __future__ import annotations

import contextlib
import io
import json
import random
import shutil
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from pipeline.config.schema import DatasetConfig
from pipeline.data.dataset import open_dataset
from pipeline.errors import DataError
from pipeline.prepare.build import prepare_dataset
from pipeline.prepare.verify import verify_dataset
from pipeline.sources import survey, units
from tests.data.small_datasets import jpeg
from tests.prepare.source_folders import (
    backwards,
    class_folders,
    class_tars,
    images,
    prepare,
    serial,
    shard_bytes,
    tar_bytes,
    write_tar,
)


def contents(target: Path, split: str) -> dict[bytes, int]:
    found = open_dataset(target).split(split)
    return {bytes(found.image(i)): found.label(i) for i in range(len(found))}


def reasons(target: Path) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for line in (target / "quarantine" / "rejected.jsonl").read_text().splitlines():
        entry = json.loads(line)
        found.setdefault(entry["reason"], []).append(entry["key"])
    return found


def test_class_tars_with_their_own_validation(tmp_path: Path) -> None:
    metrics = prepare(class_tars(tmp_path / "in"), tmp_path / "out", shard_rows=25)
    assert (metrics["images"], metrics["validation"], metrics["classes"], metrics["rejected"]) == (
        60,
        18,
        3,
        0,
    )
    wanted = {data: label for label in range(3) for data in images(label, 20).values()}
    assert contents(tmp_path / "out", "train") == wanted
    assert open_dataset(tmp_path / "out").classes == ["c0", "c1", "c2"]
    assert not (tmp_path / "out" / "work").exists()
    assert verify_dataset(tmp_path / "out", serial, lambda *_: None) == []


def test_every_shard_is_a_mixture_of_classes(tmp_path: Path) -> None:
    prepare(class_tars(tmp_path / "in", classes=4, count=100), tmp_path / "out", shard_rows=100)
    for shard in sorted((tmp_path / "out").glob("train-*.parquet")):
        labels = pq.read_table(shard, columns=["label"])["label"].to_numpy()
        assert (np.bincount(labels, minlength=4) > 10).all()


def test_class_folders_are_split_by_content(tmp_path: Path) -> None:
    metrics = prepare(
        class_folders(tmp_path / "in", count=100), tmp_path / "out", validation_fraction=0.2
    )
    assert metrics["images"] + metrics["validation"] == 300
    assert 35 <= metrics["validation"] <= 85
    assert (
        not contents(tmp_path / "out", "train").keys()
        & contents(tmp_path / "out", "validation").keys()
    )


def test_a_tar_of_tars_as_published(tmp_path: Path) -> None:
    source = tmp_path / "in"
    write_tar(
        source / "ILSVRC2012_img_train.tar",
        {f"n{i:08d}.tar": tar_bytes(images(i, 12)) for i in range(3)},
    )
    validation = {f"ILSVRC2012_val_{i:08d}.JPEG": jpeg(9000 + i, 40, 32) for i in range(1, 8)}
    labels = [f"n{i % 3:08d}" for i in range(1, 8)]
    write_tar(source / "ILSVRC2012_img_val.tar", dict(reversed(validation.items())))
    with pytest.raises(DataError, match="labels of the validation images are missing"):
        prepare(source, tmp_path / "out")
    (source / "imagenet_2012_validation_synset_labels.txt").write_text("\n".join(labels) + "\n")
    metrics = prepare(source, tmp_path / "out")
    assert (metrics["images"], metrics["validation"]) == (36, 7)
    wanted = {data: i % 3 for i, data in enumerate(validation.values(), 1)}
    assert contents(tmp_path / "out", "validation") == wanted
    (source / "imagenet_2012_validation_synset_labels.txt").unlink()
    rows = "".join(f"ILSVRC2012_val_{i:08d},{label} 1 2 3 4\n" for i, label in enumerate(labels, 1))
    (source / "LOC_val_solution.csv").write_text("ImageId,PredictionString\n" + rows)
    prepare(source, tmp_path / "kaggle")
    assert contents(tmp_path / "kaggle", "validation") == wanted


def test_large_tars_are_cut_at_members(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = class_tars(tmp_path / "in", count=40)
    prepare(source, tmp_path / "whole")
    for module in (survey, units):
        monkeypatch.setattr(module, "UNIT_BYTES", 5000)
    assert len(survey.survey(DatasetConfig(root=str(source))).units) > 20
    prepare(source, tmp_path / "cut")
    for split in ("train", "validation"):
        assert contents(tmp_path / "cut", split) == contents(tmp_path / "whole", split)


def test_a_source_in_another_file_system(tmp_path: Path) -> None:
    import fsspec

    memory = fsspec.filesystem("memory")
    for path in class_tars(tmp_path / "in").rglob("*.tar"):
        memory.pipe_file(f"/bucket/{path.relative_to(tmp_path / 'in')}", path.read_bytes())
    prepare("memory://bucket", tmp_path / "remote")
    prepare(tmp_path / "in", tmp_path / "local")
    assert contents(tmp_path / "remote", "train") == contents(tmp_path / "local", "train")


@pytest.mark.parametrize("labels", ["names", "integers"])
def test_a_hugging_face_dataset(tmp_path: Path, labels: str) -> None:
    import datasets

    def made(count: int, first: int) -> datasets.Dataset:
        rows = [(jpeg(first + i, 40, 32), i % 3) for i in range(count)]
        columns = {
            "image": [{"bytes": data, "path": None} for data, _ in rows],
            "label": [label for _, label in rows],
        }
        kind = (
            datasets.ClassLabel(names=["zebra", "ape", "cat"])
            if labels == "names"
            else datasets.Value("int64")
        )
        features = datasets.Features({"image": datasets.Image(), "label": kind})
        return datasets.Dataset.from_dict(columns, features=features)

    source = datasets.DatasetDict({"train": made(30, 0), "validation": made(9, 900)})
    source.save_to_disk(str(tmp_path / "saved"))
    for split, rows in source.items():
        rows.to_parquet(str(tmp_path / "parquet" / f"{split}-00000-of-00001.parquet"))
    for layout in ("saved", "parquet"):
        prepare(tmp_path / layout, tmp_path / f"out-{layout}", layout="huggingface")
        assert contents(tmp_path / f"out-{layout}", "train") == {
            jpeg(i, 40, 32): i % 3 for i in range(30)
        }
        assert contents(tmp_path / f"out-{layout}", "validation") == {
            jpeg(900 + i, 40, 32): i % 3 for i in range(9)
        }
        classes = open_dataset(tmp_path / f"out-{layout}").classes
        assert classes == (["zebra", "ape", "cat"] if labels == "names" else ["0", "1", "2"])
    with pytest.raises(DataError, match="no column 'picture'"):
        prepare(
            tmp_path / "saved", tmp_path / "other", layout="huggingface", image_column="picture"
        )


def test_duplicates_are_dropped_and_listed(tmp_path: Path) -> None:
    source = class_tars(tmp_path / "in")
    shared, own = images(0, 20), images(1, 20)
    doubled = {
        **shared,
        "again.JPEG": shared["c0_3.JPEG"],
        "leak.JPEG": images(0, 6, first=500)["c0_2.JPEG"],
    }
    write_tar(source / "train" / "c0.tar", doubled)
    write_tar(source / "train" / "c1.tar", {**own, "other_class.JPEG": shared["c0_4.JPEG"]})
    metrics = prepare(source, tmp_path / "out")
    assert (metrics["images"], metrics["validation"], metrics["duplicates"]) == (61, 18, 2)
    assert reasons(tmp_path / "out") == {
        "duplicate": ["train/c0/again.JPEG"],
        "in_validation": ["train/c0/leak.JPEG"],
    }


def test_a_name_twice_in_an_archive_counts_once(tmp_path: Path) -> None:
    source = class_tars(tmp_path / "in")
    with tarfile.open(source / "train" / "c0.tar", "a") as tar:
        info = tarfile.TarInfo("c0_3.JPEG")
        other = jpeg(77, 40, 32)
        info.size = len(other)
        tar.addfile(info, io.BytesIO(other))
    metrics = prepare(source, tmp_path / "out")
    assert (metrics["images"], metrics["duplicates"]) == (60, 1)
    assert reasons(tmp_path / "out") == {"duplicate_name": ["train/c0/c0_3.JPEG"]}


def test_a_hostile_archive_writes_nothing_outside(tmp_path: Path) -> None:
    source = class_tars(tmp_path / "in")
    with tarfile.open(source / "train" / "c0.tar", "a") as tar:
        for name in ("/tmp_absolute.JPEG", "../../escaped.JPEG"):
            info = tarfile.TarInfo(name)
            info.size = len(jpeg(1, 40, 32))
            tar.addfile(info, io.BytesIO(jpeg(1, 40, 32)))
        for name, kind in (
            ("link.JPEG", tarfile.SYMTYPE),
            ("hard.JPEG", tarfile.LNKTYPE),
            ("device", tarfile.CHRTYPE),
        ):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "/etc/passwd"
            tar.addfile(info)
    metrics = prepare(source, tmp_path / "out")
    assert (metrics["images"], metrics["rejected"]) == (60, 5)
    counted = {reason: len(keys) for reason, keys in reasons(tmp_path / "out").items()}
    assert counted == {"unsafe_name": 2, "not_a_file": 3}
    assert {path.name for path in tmp_path.iterdir()} == {"in", "out"}


@pytest.mark.parametrize("cut", ["data", "header"])
def test_a_tar_cut_short_gives_what_it_has(tmp_path: Path, cut: str) -> None:
    source = class_tars(tmp_path / "in")
    path = source / "train" / "c1.tar"
    with tarfile.open(path) as tar:
        tenth = tar.getmembers()[10]
    path.write_bytes(
        path.read_bytes()[: (tenth.offset_data if cut == "data" else tenth.offset) + 200]
    )
    metrics = prepare(source, tmp_path / "out")
    assert (metrics["images"], metrics["rejected"]) == (50, 1)
    assert list(reasons(tmp_path / "out")) == ["damaged_archive"]


def test_too_many_bad_images_stop_the_work_with_the_causes(tmp_path: Path) -> None:
    source = class_tars(tmp_path / "in")
    bad = {f"bad{i}.JPEG": jpeg(i, 40, 32)[:-200] for i in range(5)}
    write_tar(source / "train" / "c2.tar", {**images(2, 20), **bad, "text.JPEG": b"no"})
    with pytest.raises(DataError) as caught:
        prepare(source, tmp_path / "out", max_rejected=0.01)
    assert "6 of 84 images are unusable (7.1%)" in str(caught.value)
    assert "5 x truncated, such as train/c2/bad0.JPEG (Premature end of JPEG file)" in str(
        caught.value
    )
    assert "max_rejected (now 0.01)" in str(caught.value)
    assert len(list((tmp_path / "out" / "quarantine" / "truncated").iterdir())) == 5
    assert prepare(source, tmp_path / "out", max_rejected=0.1)["rejected"] == 6


def test_unusable_sources_are_told(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    cases: dict[str, Any] = {
        "no such folder": tmp_path / "missing",
        "no images in a layout": tmp_path / "empty",
    }
    one = class_folders(tmp_path / "one", classes=1)
    cases["1 class: nothing to tell apart"] = one
    write_tar(tmp_path / "none" / "a.tar", {"x.JPEG": b""})
    write_tar(tmp_path / "none" / "b.tar", {"x.JPEG": b""})
    cases["no image is left for the train split"] = tmp_path / "none"
    for words, root in cases.items():
        with pytest.raises(DataError, match=words):
            prepare(root, tmp_path / "out")
    with pytest.raises(
        DataError, match=r"3 classes of the source are not in the class list imagenet1k: c0, c1, c2"
    ):
        prepare(class_folders(tmp_path / "unknown"), tmp_path / "out", classes="imagenet1k")


def test_a_class_without_images_is_said(tmp_path: Path) -> None:
    source = class_folders(tmp_path / "in")
    (source / "c9").mkdir()
    said: list[str] = []
    config = DatasetConfig(root=str(source), min_side=16)
    prepare_dataset(
        "set",
        config,
        tmp_path / "out",
        0,
        serial,
        lambda *_: None,
        lambda text, level: said.append(text),
    )
    assert said == ["set: 1 classes have no image: c9"]
    assert open_dataset(tmp_path / "out").classes == ["c0", "c1", "c2", "c9"]


def test_the_bytes_depend_on_images_settings_and_seed_alone(tmp_path: Path) -> None:
    source = class_tars(tmp_path / "in", count=50)
    prepare(source, tmp_path / "a", shard_rows=40)
    shutil.copytree(source, tmp_path / "elsewhere")
    prepare(tmp_path / "elsewhere", tmp_path / "b", tasks=backwards, shard_rows=40)
    assert shard_bytes(tmp_path / "a") == shard_bytes(tmp_path / "b")
    prepare(source, tmp_path / "c", shard_rows=40, seed=1)
    assert shard_bytes(tmp_path / "a") != shard_bytes(tmp_path / "c")


def test_an_interrupted_preparation_ends_with_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(units, "UNIT_BYTES", 20_000)
    source = class_tars(tmp_path / "in", count=30)
    write_tar(source / "train" / "c0.tar", {**images(0, 30), "bad.JPEG": b"no"})
    prepare(source, tmp_path / "undisturbed", shard_rows=20)
    wanted = shard_bytes(tmp_path / "undisturbed")
    for seed in range(6):
        target = tmp_path / f"out{seed}"
        for attempt in range(4):
            with contextlib.suppress(Killed):
                prepare(
                    source,
                    target,
                    tasks=_dying(random.Random(10 * seed + attempt), target),
                    shard_rows=20,
                )
        prepare(source, target, shard_rows=20)
        assert shard_bytes(target) == wanted


class Killed(BaseException):
    """In place of a signal."""


def _dying(choices: random.Random, target: Path) -> Any:
    """Tasks that end at a random moment and leave half a file behind."""

    def tasks(function: Any, items: Any) -> Any:
        for item in items:
            result = function(item)
            if choices.random() < 0.15 and (target / "work").exists():
                (target / "work" / ".unit-000000.parquet.1.tmp").write_bytes(b"half")
                raise Killed
            yield item, result

    return tasks


@pytest.mark.parametrize("damage", ["deleted", "truncated", "flipped"])
def test_damage_is_found_and_mended(tmp_path: Path, damage: str) -> None:
    source = class_tars(tmp_path / "in")
    prepare(source, tmp_path / "out", shard_rows=20)
    wanted = shard_bytes(tmp_path / "out")
    shard = tmp_path / "out" / "train-00001.parquet"
    data = shard.read_bytes()
    if damage == "deleted":
        shard.unlink()
    else:
        shard.write_bytes(
            data[:-100]
            if damage == "truncated"
            else data[:5000] + bytes([data[5000] ^ 1]) + data[5001:]
        )
    problems = verify_dataset(tmp_path / "out", serial, lambda *_: None)
    assert len(problems) == 1
    assert "train-00001.parquet" in problems[0]
    kept = (tmp_path / "out" / "train-00000.parquet").stat().st_mtime_ns
    prepare(source, tmp_path / "out", shard_rows=20)
    assert shard_bytes(tmp_path / "out") == wanted
    assert (tmp_path / "out" / "train-00000.parquet").stat().st_mtime_ns == kept


def test_other_settings_move_the_old_dataset_aside(tmp_path: Path) -> None:
    source = class_tars(tmp_path / "in")
    prepare(source, tmp_path / "out", shard_rows=20)
    old = shard_bytes(tmp_path / "out")
    prepare(source, tmp_path / "out", shard_rows=30)
    aside = next(path for path in tmp_path.iterdir() if path.name.startswith("out.replaced-"))
    assert shard_bytes(aside) == old
    assert not (tmp_path / "out" / "train-00002.parquet").exists()
