"""Damaged images: named with file and row, or replaced in the same way on every rank and resume."""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipeline.data.dataset import PreparedDataset, Split, open_dataset
from pipeline.data.loader import EvalLoader
from pipeline.data.order import GlobalOrder, RepeatedOrder, WindowedOrder
from pipeline.data.prefetch import MAX_REASONS
from pipeline.data.preprocessing import Preprocessing
from pipeline.errors import DataError
from tests.data.loading import by_step, merged, take, train_loader
from tests.data.small_datasets import damage, make_dataset

BAD = [3, 25, 26, 27, 39]
CHANGED = "checksum mismatch: the image changed after preparation"


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> PreparedDataset:
    return make_dataset(tmp_path_factory.mktemp("set"), {"train": 101}, shard_rows=40)


@pytest.fixture(scope="module")
def damaged(tmp_path_factory: pytest.TempPathFactory) -> Split:
    """Three shards of 20 images; the images `BAD` are damaged."""
    folder = tmp_path_factory.mktemp("damaged")
    split = make_dataset(folder, {"train": 60}, shard_rows=20).split("train")
    damage(split, BAD)
    return split


def test_evaluation_names_a_damaged_image(tmp_path: Path) -> None:
    split = make_dataset(tmp_path, {"train": 40}, shard_rows=20).split("train")
    damage(split, [25])
    with (
        EvalLoader(split, preprocessing=Preprocessing(32, "whole"), batch=8, threads=2) as loader,
        pytest.raises(
            DataError, match=rf"train-00001.parquet, row 5: {CHANGED}\n  -> .*--stage prepare:"
        ),
    ):
        list(loader)


def test_one_flipped_bit_is_named_although_the_image_still_decodes(tmp_path: Path) -> None:
    split = make_dataset(tmp_path, {"train": 24}, shard_rows=24).split("train")
    take(train_loader(split), 1)
    shard = tmp_path / "train-00000.parquet"
    content = bytearray(shard.read_bytes())
    offset, length = np.load(tmp_path / "train-00000.idx")[:2, 7].tolist()
    content[offset + length - 9] ^= 1
    shard.write_bytes(content)
    split = open_dataset(tmp_path).split("train")
    with pytest.raises(DataError, match=rf"train-00000.parquet, row 7: {CHANGED}"):
        take(train_loader(split), 1)


def test_training_stops_at_a_damaged_image_by_default(damaged: Split) -> None:
    with pytest.raises(
        DataError, match=rf"train-0000[01].parquet, row \d+: {CHANGED}\n  -> .*prepare"
    ):
        take(train_loader(damaged, global_batch=12, micro_batch=12), 10)


def replacing(repeats: int) -> dict[str, Any]:
    """Settings of a loader that replaces damaged images in windowed order."""
    order = RepeatedOrder(WindowedOrder([20, 20, 20], 3, 2), repeats, 12)
    return {"global_batch": 12, "micro_batch": 12, "order": order, "on_bad_sample": "replace"}


@pytest.mark.parametrize("repeats", [1, 2])
def test_damaged_image_is_replaced_from_its_global_batch(damaged: Split, repeats: int) -> None:
    loader = train_loader(damaged, **replacing(repeats))
    for batch in take(loader, 5 * repeats):
        planned = batch.views % len(damaged)
        changed = torch.isin(planned, torch.tensor(BAD))
        assert torch.equal(batch.samples[~changed], planned[~changed])
        assert set(batch.samples[changed].tolist()) <= set(batch.samples[~changed].tolist())
        assert batch.labels.tolist() == [damaged.label(int(sample)) for sample in batch.samples]
    assert loader.replaced_samples == repeats * len(BAD)


@pytest.mark.parametrize("repeats", [1, 2])
def test_reasons_of_replaced_images_are_reported_once(damaged: Split, repeats: int) -> None:
    loader = train_loader(damaged, **replacing(repeats))
    take(loader, 5 * repeats)
    reasons = loader.new_reasons()
    # With repeats, twice as many images are replaced as reasons are kept.
    assert len(reasons) == MAX_REASONS
    possible = {f"{damaged.place(sample)}: {CHANGED}" for sample in BAD}
    assert set(reasons) <= possible
    if repeats == 1:
        assert set(reasons) == possible
    assert loader.new_reasons() == []


@pytest.mark.parametrize("repeats", [1, 2])
def test_replacement_does_not_depend_on_threads_ranks_or_interruptions(
    damaged: Split, repeats: int
) -> None:
    settings = replacing(repeats)
    steps = 5 * repeats
    runs = []
    for threads in (1, 2, 8):
        loader = train_loader(damaged, threads=threads, **settings)
        runs.append(by_step(take(loader, steps)))
        assert loader.replaced_samples == repeats * len(BAD)
    assert runs[0] == runs[1]
    assert runs[1] == runs[2]
    resumed = by_step(take(train_loader(damaged, start_step=2, **settings), steps - 2))
    assert resumed == {step: runs[0][step] for step in range(2, steps)}
    ranks = []
    count = 0
    for rank in range(2):
        loader = train_loader(damaged, world_size=2, rank=rank, **(settings | {"micro_batch": 6}))
        ranks.append(by_step(take(loader, steps)))
        count += loader.replaced_samples
    assert merged(ranks) == runs[0]
    assert count == repeats * len(BAD)


def test_damaged_batch_is_replaced_from_the_epoch_and_damaged_epoch_stops(tmp_path: Path) -> None:
    split = make_dataset(tmp_path, {"train": 60}, shard_rows=20).split("train")
    damage(split, list(range(40)))
    settings = {
        "global_batch": 10,
        "micro_batch": 10,
        "on_bad_sample": "replace",
        "order": WindowedOrder([20] * 3, 3, 1),
    }
    loader = train_loader(split, **settings)
    samples = torch.cat([batch.samples for batch in take(loader, 6)])
    assert loader.replaced_samples == 40
    assert samples.min() >= 40
    damage(split, list(range(60)))
    with pytest.raises(
        DataError,
        match=rf"row \d+: {CHANGED}; none of 64 replacement images can be read either",
    ):
        take(train_loader(split, **settings), 1)


def test_images_of_a_shard_that_its_split_cannot_read_are_replaced(
    dataset: PreparedDataset,
) -> None:
    class Lost(Split):
        def image(self, i: int) -> memoryview:
            if 40 <= i < 80:
                raise DataError(
                    "cannot be read: No such file",
                    place=self.place(i),
                    remedy="prepare it again",
                )
            return super().image(i)

    split = copy.copy(dataset.split("train"))
    split.__class__ = Lost
    with pytest.raises(DataError, match=r"train-00001.parquet, row \d+: cannot be read"):
        take(train_loader(split), 4)
    loader = train_loader(split, on_bad_sample="replace")
    samples = torch.cat([batch.samples for batch in take(loader, 4)])
    assert not ((samples >= 40) & (samples < 80)).any()
    shards = GlobalOrder(101, 3).indices(0, 0, 96) // 40
    assert loader.replaced_samples == int((shards == 1).sum())


@pytest.mark.parametrize("damage", ["missing", "truncated"])
def test_images_of_a_missing_shard_are_replaced_only_on_request(
    damage: str, tmp_path: Path
) -> None:
    make_dataset(tmp_path, {"train": 60}, shard_rows=20)
    shard = tmp_path / "train-00001.parquet"
    if damage == "truncated":
        shard.write_bytes(shard.read_bytes()[:-9])
    else:
        shard.unlink()
    with pytest.raises(DataError, match=r"train-00001.parquet"):
        open_dataset(tmp_path).split("train")
    split = open_dataset(tmp_path, whole=False).split("train")
    assert_shard_1_is_named_or_replaced(split, r"train-00001.parquet, row \d+")


def test_images_of_a_shard_truncated_while_mapped_are_named_or_replaced(tmp_path: Path) -> None:
    split = make_dataset(tmp_path, {"train": 60}, shard_rows=20).split("train")
    size = (tmp_path / "train-00001.parquet").stat().st_size
    os.truncate(tmp_path / "train-00001.parquet", 100)
    assert_shard_1_is_named_or_replaced(
        split, rf"train-00001.parquet, row \d+: has 100 bytes instead of {size}"
    )


def assert_shard_1_is_named_or_replaced(split: Split, message: str) -> None:
    """Shard 1 holds the samples 20 to 39."""
    settings = {"global_batch": 12, "micro_batch": 12}
    with pytest.raises(DataError, match=message):
        take(train_loader(split, **settings), 5)
    loader = train_loader(split, on_bad_sample="replace", **settings)
    samples = torch.cat([batch.samples for batch in take(loader, 5)])
    assert not ((samples >= 20) & (samples < 40)).any()
    assert loader.replaced_samples == 20
