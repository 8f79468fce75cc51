"""The data lines of the catalogue of faults (D1 to D9, N5): work goes on and nothing is lost, or it stops before harm.

What is asserted elsewhere: D6 in tests/e2e/test_preparation_killed.py; single files (D1, D2) in test_clean.py, huge ones in
test_memory.py; layouts, hostile and cut archives (D3), duplicates (D4) and sources that cannot be used (D5, D9) in
test_dataset.py as well.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import resource
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.config.schema import DatasetConfig, SyntheticConfig
from pipeline.data.dataset import open_dataset
from pipeline.data.loader import EvalLoader
from pipeline.data.shards import index_path
from pipeline.errors import CheckpointError, DataError, PipelineError
from pipeline.evaluate.network import load_network
from pipeline.files import file_digest, write_json
from pipeline.layout import RunDir
from pipeline.prepare.clean import clean
from pipeline.prepare.verify import verify_dataset
from pipeline.runtime.dist_env import DistEnv
from pipeline.sources.reader import Rejected
from pipeline.synthetic import generate
from pipeline.train.trainer import train_stage
from tests.data.small_datasets import jpeg, make_dataset
from tests.prepare.source_folders import (
    class_folders,
    class_tars,
    images,
    prepare,
    serial,
    shard_bytes,
    tar_bytes,
    write_tar,
)
from tests.train import staging

ROOT = Path(__file__).resolve().parents[2]


def described(target: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((target / "dataset.json").read_text())
    return found


def listed(target: Path) -> list[dict[str, str]]:
    return [
        json.loads(line)
        for line in (target / "quarantine" / "rejected.jsonl").read_text().splitlines()
    ]


# D1, D2: what single files can be


@pytest.mark.parametrize("layout", ["class_tars", "class_folders", "imagenet_tars"])
def test_every_kind_of_dirt_is_counted_under_its_reason(layout: str, tmp_path: Path) -> None:
    made_up = SyntheticConfig(
        classes=4,
        images_per_class=6,
        validation_per_class=3,
        min_size=48,
        max_size=80,
        corrupt_fraction=1.0,
    )
    config = DatasetConfig.model_validate({"layout": layout, "synthetic": made_up})
    for piece in generate.pieces(config, tmp_path / "in"):
        generate.make(piece)
    generate.finish(config, tmp_path / "in")
    assert generate.dirt_kinds(config) == dict.fromkeys(generate.KINDS, 2)
    metrics = prepare(tmp_path / "in", tmp_path / "out", layout=layout, min_side=32)
    found = described(tmp_path / "out")
    assert found["rejected"] == {
        "empty": 2,
        "not_an_image": 4,
        "too_small": 2,
        "truncated": 2,
    }  # web pages and litter: 4
    assert found["duplicates"] == {"duplicate": 2, "in_validation": 2}
    assert found["changed"] == {"converted": 6, "unpacked": 2}
    assert (metrics["images"], metrics["validation"]) == (24 + 24 - 10 - 4, 12)
    entries = listed(tmp_path / "out")
    assert len(entries) == 14 and all(entry["reason"] and entry["key"] for entry in entries)
    kept = [tmp_path / "out" / "quarantine" / entry["file"] for entry in entries if entry["file"]]
    assert len(kept) == 8 and all(path.is_file() for path in kept), (
        "rejected files can be looked at"
    )
    assert verify_dataset(tmp_path / "out", serial, lambda *_: None) == []


# D3: archives


def test_nothing_is_written_outside_whatever_an_archive_names(tmp_path: Path) -> None:
    source, names = (
        class_tars(tmp_path / "in"),
        ["/abs.JPEG", "../up.JPEG", "a/../../up.JPEG", "..", "n\n.JPEG", "x" * 5000],
    )
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.GNU_FORMAT) as tar:
        for number, name in enumerate(names):
            info = tarfile.TarInfo(name)
            info.size = len(jpeg(90 + number, 40, 32))
            tar.addfile(info, io.BytesIO(jpeg(90 + number, 40, 32)))
        for name, kind in (
            ("s", tarfile.SYMTYPE),
            ("h", tarfile.LNKTYPE),
            ("c", tarfile.CHRTYPE),
            ("b", tarfile.BLKTYPE),
            ("f", tarfile.FIFOTYPE),
        ):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, str(tmp_path / "outside")
            tar.addfile(info)
        through = tarfile.TarInfo("s/through-a-link.JPEG")
        through.size = len(jpeg(99, 40, 32))
        tar.addfile(through, io.BytesIO(jpeg(99, 40, 32)))
    (source / "train" / "c1.tar").write_bytes(out.getvalue())
    before = set(tmp_path.rglob("*"))
    prepare(source, tmp_path / "out")
    assert described(tmp_path / "out")["rejected"] == {"not_a_file": 5, "unsafe_name": 4}
    assert described(tmp_path / "out")["splits"]["train"]["images_by_class"] == [
        20,
        3,
        20,
    ]  # n\\n, xxx, s/through
    new = set(tmp_path.rglob("*")) - before
    assert all((tmp_path / "out") in (path, *path.parents) for path in new)
    assert not any(path.is_symlink() or not (path.is_file() or path.is_dir()) for path in new)
    assert not Path("/abs.JPEG").exists()


def test_damaged_archives_never_stop_the_work(tmp_path: Path) -> None:
    """One byte of the headers changed, or the tar cut anywhere: what can be read is read, the rest is told."""
    whole = tar_bytes(images(1, 6))
    with tarfile.open(fileobj=io.BytesIO(whole)) as tar:
        headers = [member.offset for member in tar]
    choices = np.random.default_rng(0)
    for number in range(24):
        source = tmp_path / f"in{number}"
        write_tar(source / "train" / "c0.tar", images(0, 6))
        write_tar(source / "val" / "c0.tar", images(0, 2, first=500))
        if number % 2:
            data = whole[: int(choices.integers(1, len(whole)))]
        else:
            place = headers[int(choices.integers(6))] + int(choices.integers(tarfile.BLOCKSIZE))
            data = (
                whole[:place]
                + bytes([whole[place] ^ (1 << int(choices.integers(8)))])
                + whole[place + 1 :]
            )
        (source / "train" / "c1.tar").write_bytes(data)
        metrics = prepare(source, tmp_path / f"out{number}")
        counts = described(tmp_path / f"out{number}")["splits"]["train"]["images_by_class"]
        assert counts[0] == 6 and counts[1] <= 6
        if counts[1] < 6:
            reasons = set(described(tmp_path / f"out{number}")["rejected"])
            assert number % 2 or metrics["rejected"] >= 1
            assert reasons <= {
                "damaged_archive",
                "truncated",
                "undecodable",
                "not_an_image",
                "not_a_file",
                "unsafe_name",
            }


# D4, D5, D9: sources


def test_duplicates_across_classes_and_splits(tmp_path: Path) -> None:
    """One picture under two classes stays under both; what validation has, training loses, in whatever class."""
    source = class_tars(tmp_path / "in", classes=2)
    both, held_out = jpeg(700, 40, 32), images(1, 6, first=500)["c1_0.JPEG"]
    for label in range(2):
        write_tar(
            source / "train" / f"c{label}.tar",
            {**images(label, 20), "both.JPEG": both, "leak.JPEG": held_out},
        )
    prepare(source, tmp_path / "out")
    found = described(tmp_path / "out")
    assert found["duplicates"] == {"in_validation": 2}
    assert found["splits"]["train"]["images_by_class"] == [21, 21]


@pytest.mark.parametrize("layout", ["tars", "folders"])
def test_zero_images_and_one_class_are_told_with_a_remedy(layout: str, tmp_path: Path) -> None:
    if layout == "tars":
        for name in "ab":
            write_tar(tmp_path / "zero" / f"{name}.tar", {})
        write_tar(tmp_path / "one" / "a.tar", images(0, 5))
    else:
        for name in "ab":
            (tmp_path / "zero" / name).mkdir(parents=True)
        class_folders(tmp_path / "one", classes=1)
    for source, words in (
        ("zero", r"zero: no image is left for the train split\n  -> add images"),
        ("one", r"one: has 1 class: nothing to tell apart\n  -> two classes or more"),
    ):
        with pytest.raises(DataError, match=words):
            prepare(tmp_path / source, tmp_path / "out")
        assert not (tmp_path / "out" / "dataset.json").exists()


def test_a_dataset_smaller_than_a_batch_stops_training_before_it_begins(tmp_path: Path) -> None:
    run_dir = staging.prepared(tmp_path, train=15)
    with pytest.raises(
        DataError,
        match=r"15 training images are fewer than one global batch of 16\n  -> lower global_batch",
    ):
        train_stage(
            staging.job(), "pretrain", RunDir(run_dir), DistEnv.from_environment(), lambda: False
        )


def test_classes_in_another_order_than_the_models_are_refused(tmp_path: Path) -> None:
    run_dir = staging.prepared(tmp_path)
    staging.with_weights(run_dir)
    data, weights = (
        open_dataset(run_dir / "stages" / "prepare" / "set"),
        run_dir / "stages" / "finetune" / "weights.json",
    )
    write_json(weights, {"image_size": 64, "classes": data.classes})
    load_network(staging.job(), RunDir(run_dir), "finetune", data)
    write_json(weights, {"image_size": 64, "classes": data.classes[::-1]})
    words = r"weights\.safetensors: weights were trained on 6 classes that are not the 6 of set\n  -> take the dataset"
    with pytest.raises(CheckpointError, match=words):
        load_network(staging.job(), RunDir(run_dir), "finetune", data)


# D7: a disk that is full


def test_a_file_size_limit_leaves_nothing_half_written(tmp_path: Path) -> None:
    """The limit is met wherever it falls: in a unit's spill, in a shard; the next run goes on to the same bytes."""
    source = class_tars(tmp_path / "in", count=30)
    prepare(source, tmp_path / "undisturbed", shard_rows=40)
    wanted = shard_bytes(tmp_path / "undisturbed")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    largest = max(len(data) for data in wanted.values())
    for limit in (1000, largest // 2, largest - 1):
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
            with pytest.raises(OSError):
                prepare(source, tmp_path / "out", shard_rows=40)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        for path in (tmp_path / "out").glob("train-*.parquet"):
            assert path.read_bytes() == wanted[path.name], "what has its name is whole"
        assert not list((tmp_path / "out").rglob(".*.tmp"))
    prepare(source, tmp_path / "out", shard_rows=40)
    assert shard_bytes(tmp_path / "out") == wanted


FULL = """
import subprocess, sys
from pathlib import Path
job, there = sys.argv[1], Path(sys.argv[2])
there.mkdir()
command = [sys.executable, "-m", "pipeline", job, "--run-dir", str(there / "run")]
for size in ("8k", "2m", "200m"):  # full for the run's own files; for a unit; not full
    how = ["-o", f"remount,size={size}"] if (there / "run").exists() else ["-t", "tmpfs", "-o", f"size={size}", "none"]
    subprocess.run(["mount", *how, str(there)], check=True)
    done = subprocess.run(command, capture_output=True, text=True)
    print(done.returncode, done.stdout + done.stderr, sep="\\n", end="\\n=====\\n")
subprocess.run(["cp", "-r", str(there / "run/stages/prepare/images"), sys.argv[3]], check=True)
"""
JOB = """
name: small
model: {{channels: [8, 16, 24, 32], depths: [1, 1, 2, 1], columns: 4}}
data: {{root: {root}, min_side: 16, shard_rows: 400}}
stages: {{prepare: {{}}}}
"""


@pytest.mark.slow
def test_a_full_disk_is_told_and_the_same_command_goes_on(tmp_path: Path) -> None:
    if (
        shutil.which("unshare") is None
        or subprocess.run(["unshare", "-rm", "true"], check=False).returncode != 0
    ):
        pytest.skip("file systems cannot be mounted here")
    source = class_tars(tmp_path / "in", classes=4, count=300)
    prepare(source, tmp_path / "undisturbed", shard_rows=400)
    (tmp_path / "small.yaml").write_text(JOB.format(root=source))
    done = subprocess.run(
        [
            "unshare",
            "-rm",
            sys.executable,
            "-c",
            FULL,
            *(str(tmp_path / name) for name in ("small.yaml", "disk", "out")),
        ],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    runs = done.stdout.split("\n=====\n")[:-1]
    assert [run.split("\n", 1)[0] for run in runs] == ["3", "3", "0"], done.stdout
    for run in runs[:2]:
        assert (
            "the disk is full" in run
            and "free some space, then rerun the same command to resume" in run
        )
    assert "Traceback" not in done.stdout
    assert shard_bytes(tmp_path / "out").keys() == shard_bytes(tmp_path / "undisturbed").keys()
    for name, data in shard_bytes(tmp_path / "undisturbed").items():
        if name.endswith((".parquet", ".idx")):
            assert (tmp_path / "out" / name).stat().st_size == len(data)
    assert verify_dataset(tmp_path / "out", serial, lambda *_: None) == []


# D8: shards that change after preparation


def flip(path: Path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


def test_one_flipped_bit_anywhere_in_a_dataset_is_named_by_verify(tmp_path: Path) -> None:
    make_dataset(tmp_path, {"train": 60, "validation": 9}, shard_rows=30)
    description = described(tmp_path)
    for name, split in description["splits"].items():
        labels = np.concatenate(
            [np.load(index_path(tmp_path / one["file"]))[2] for one in split["shards"]]
        )
        description["splits"][name]["images_by_class"] = np.bincount(labels).tolist()
    write_json(tmp_path / "dataset.json", description)
    assert verify_dataset(tmp_path, serial, lambda *_: None) == []
    choices = np.random.default_rng(1)
    for path in sorted(tmp_path.glob("*.[pi]*")):
        for place in choices.integers(0, path.stat().st_size, 5).tolist():
            flip(path, place)
            problems = verify_dataset(tmp_path, serial, lambda *_: None)
            assert len(problems) == 1 and path.name in problems[0], (path, place, problems)
            flip(path, place)


def test_a_shard_that_was_changed_with_its_digest_is_named_by_row(tmp_path: Path) -> None:
    """As by a disk that lies below the digest's making: the hash of each image tells the row."""
    data = make_dataset(tmp_path, {"train": 30})
    shard = tmp_path / "train-00000.parquet"
    flip(shard, int(data.split("train")._indexes[0][0, 17]) + 300)
    description = described(tmp_path)
    description["splits"]["train"]["shards"][0]["digest"] = file_digest(shard)
    description["splits"]["train"]["images_by_class"] = [8, 8, 7, 7]
    write_json(tmp_path / "dataset.json", description)
    (problem,) = verify_dataset(tmp_path, serial, lambda *_: None)
    assert problem == f"{shard}, row 17: the image is not what was written (hash differs)"


def test_the_loader_names_a_shard_that_is_gone_or_cut(tmp_path: Path) -> None:
    for damage in ("deleted", "truncated"):
        folder = tmp_path / damage
        make_dataset(folder, {"validation": 30}, shard_rows=10)
        shard = folder / "validation-00001.parquet"
        if damage == "deleted":
            shard.unlink()
        else:
            shard.write_bytes(shard.read_bytes()[:-1])
        with pytest.raises(
            DataError, match=r"validation-00001\.parquet.*\n  -> run the prepare stage again"
        ):
            split = open_dataset(folder).split("validation")
            with EvalLoader(split, image_size=32, resize=1.0, batch=8, threads=1) as loader:
                list(loader)


# N5: what is data is never run


class Owned:
    """Unpickled, it leaves a mark."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.mark,))


def test_an_index_with_code_inside_is_not_run(tmp_path: Path) -> None:
    """Even where its digest is the one that the dataset expects."""
    make_dataset(tmp_path, {"train": 4})
    index, mark = index_path(tmp_path / "train-00000.parquet"), tmp_path / "owned"
    for content in (pickle.dumps(Owned(mark)), _object_array(mark)):
        index.write_bytes(content)
        description = described(tmp_path)
        description["splits"]["train"]["shards"][0]["index_digest"] = file_digest(index)
        write_json(tmp_path / "dataset.json", description)
        with pytest.raises((PipelineError, ValueError)):
            open_dataset(tmp_path).split("train")
        assert not mark.exists()


def _object_array(mark: Path) -> bytes:
    out = io.BytesIO()
    np.save(out, np.array([Owned(mark)], dtype=object), allow_pickle=True)
    return out.getvalue()


def test_postscript_is_no_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pillow would hand it to an interpreter."""
    mark, tools = tmp_path / "owned", tmp_path / "bin"
    tools.mkdir()
    (tools / "gs").write_text(f"#!/bin/sh\ntouch {mark}\n")
    (tools / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}:{os.environ['PATH']}")
    program = (
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 100 100\n%%EndComments\nshowpage\n%%EOF\n"
    )
    judged = clean(program, "a.JPEG", DatasetConfig(root="x"))
    assert isinstance(judged, Rejected) and judged.reason == "not_an_image"
    assert not mark.exists()


def test_a_dataset_that_comes_with_a_script_is_not_run(tmp_path: Path) -> None:
    source, mark = tmp_path / "source", tmp_path / "owned"
    source.mkdir()
    (source / "source.py").write_text(f"from pathlib import Path\nPath({str(mark)!r}).touch()\n")
    with pytest.raises(DataError, match="`datasets` cannot load it"):
        prepare(source, tmp_path / "out", layout="huggingface")
    assert not mark.exists()
