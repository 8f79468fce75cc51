"""The loaders that ``bench loader`` compares, from the same images to the same thing.

That is: float32 batches (n, 3, size, size), normalised, with soft targets (n, classes); with the whole recipe after
RandAugment, random erasing and mixup or cutmix. Each does its own work and leaves the rest to the device, as in training:

- ours: threads decode, crop, flip and augment into a uint8 batch; the device makes floats of it, normalises, erases and mixes
  (`DeviceAugment`).
- pillow: PyTorch's DataLoader over files, decoded by Pillow; processes do everything for each image, normalisation and
  erasing included; the device mixes the batch.
- webdataset: tar shards through WebDataset, shuffled in a buffer; else as pillow.
- huggingface: Parquet (our shards) through `datasets.load_dataset`; else as pillow.
"""

from __future__ import annotations

import io
import os
import tarfile
from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image as Pillow
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from pipeline.bench.pillow import UsualTransform, mix, one_hot
from pipeline.config.schema import AugmentConfig
from pipeline.data.dataset import open_dataset
from pipeline.data.device import DeviceAugment
from pipeline.data.loader import Batch, TrainLoader

CLASSES = 1000
TARS = 4  # shards for WebDataset: workers share them out
PLAIN = AugmentConfig(
    randaugment=0, color_jitter=0, random_erasing=0, mixup=0, cutmix=0, smoothing=0
)
RECIPES = {"crop_flip": PLAIN, "full": AugmentConfig()}


@dataclass(frozen=True)
class Load:
    """What a loader is to do. ``directory``: of `lay_out`. ``workers``: threads of ours, processes of the others."""

    directory: str
    recipe: str
    workers: int
    batch: int = 64
    image_size: int = 224


@dataclass(frozen=True)
class Delivery:
    """Endless batches as the loader hands them over, and the device's work on one: images and targets."""

    batches: Generator[Any]
    finish: Callable[[Any], tuple[Tensor, Tensor]]


def lay_out(directory: Path) -> None:
    """Write the images of the prepared dataset ``directory/dataset`` as the other loaders want them: files and tars."""
    split = open_dataset(directory / "dataset").split("train")
    (directory / "tars").mkdir()
    with ExitStack() as stack:
        paths = [directory / "tars" / f"{number}.tar" for number in range(TARS)]
        tars = [stack.enter_context(tarfile.open(path, "w")) for path in paths]
        for i in range(len(split)):
            data, label = bytes(split.image(i)), split.label(i)
            path = directory / "files" / str(label) / f"{i:06d}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
            for ending, content in (("jpg", data), ("cls", str(label).encode())):
                member = tarfile.TarInfo(f"{i:06d}.{ending}")
                member.size = len(content)
                tars[i % TARS].addfile(member, io.BytesIO(content))


def ours(load: Load) -> Delivery:
    augment = RECIPES[load.recipe]
    device = DeviceAugment(augment, CLASSES, seed=0, train=True)

    def batches() -> Generator[Batch]:
        split = open_dataset(Path(load.directory) / "dataset").split("train")
        with TrainLoader(
            split,
            seed=0,
            image_size=load.image_size,
            augment=augment,
            global_batch=load.batch,
            micro_batch=load.batch,
            threads=load.workers,
        ) as loader:
            yield from loader

    def finish(batch: Batch) -> tuple[Tensor, Tensor]:
        made = device(batch.images, batch.labels, batch.samples, batch.positions, batch.epoch)
        return made.images, made.targets

    return Delivery(batches(), finish)


class _Files(Dataset[tuple[Tensor, int]]):
    """A folder of class folders, as torchvision's ImageFolder reads it."""

    def __init__(self, root: Path, transform: UsualTransform) -> None:
        self.paths = [(str(path), int(path.parent.name)) for path in sorted(root.glob("*/*.jpg"))]
        self.transform = transform

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        path, label = self.paths[i]
        with open(path, "rb") as file:
            return self.transform(Pillow.open(file).convert("RGB")), label


class _Endless(Sampler[int]):
    """Random orders of ``count`` numbers, one after the other: workers never run dry at an epoch's end."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __iter__(self) -> Iterator[int]:
        while True:
            yield from torch.randperm(self.count).tolist()


def pillow(load: Load) -> Delivery:
    files = _Files(Path(load.directory) / "files", _transform(load))
    return _delivery(
        load, DataLoader(files, load.batch, sampler=_Endless(len(files)), num_workers=load.workers)
    )


class _Decode:
    """Encoded bytes -> transformed image."""

    def __init__(self, transform: UsualTransform) -> None:
        self.transform = transform

    def __call__(self, data: bytes) -> Tensor:
        return self.transform(Pillow.open(io.BytesIO(data)).convert("RGB"))


def webdataset(load: Load) -> Delivery:
    import webdataset as wds

    urls = [str(path) for path in sorted((Path(load.directory) / "tars").glob("*.tar"))]
    samples = (
        wds.WebDataset(urls, resampled=True, shardshuffle=False).shuffle(200).to_tuple("jpg", "cls")
    )
    transformed: Any = samples.map_tuple(_Decode(_transform(load)), int)
    return _delivery(load, DataLoader(transformed, load.batch, num_workers=load.workers))


class _Columns:
    """The transform of a Hugging Face dataset: columns in, columns out."""

    def __init__(self, transform: UsualTransform) -> None:
        self.transform = transform

    def __call__(self, rows: dict[str, list[Any]]) -> dict[str, list[Any]]:
        return {
            "image": [self.transform(image.convert("RGB")) for image in rows["image"]],
            "label": rows["label"],
        }


def _tuples(rows: list[dict[str, Any]]) -> tuple[Tensor, Tensor]:
    return torch.stack([row["image"] for row in rows]), torch.tensor([row["label"] for row in rows])


def huggingface(load: Load) -> Delivery:
    os.environ["HF_HUB_OFFLINE"] = "1"
    import datasets

    datasets.disable_progress_bars()
    directory = Path(load.directory)
    files = [str(path) for path in sorted((directory / "dataset").glob("train-*.parquet"))]
    table = datasets.load_dataset(
        "parquet", data_files=files, split="train", cache_dir=str(directory / "cache")
    )
    table = table.select_columns(["image", "label"]).cast_column("image", datasets.Image())
    rows: Any = table.with_transform(_Columns(_transform(load)))
    sampler = _Endless(len(rows))
    return _delivery(
        load,
        DataLoader(rows, load.batch, sampler=sampler, num_workers=load.workers, collate_fn=_tuples),
    )


LOADERS: dict[str, Callable[[Load], Delivery]] = {
    "ours": ours,
    "pillow": pillow,
    "webdataset": webdataset,
    "huggingface": huggingface,
}


def _transform(load: Load) -> UsualTransform:
    return UsualTransform(load.image_size, load.recipe == "full")


def _delivery(load: Load, loader: DataLoader[Any]) -> Delivery:
    def batches() -> Generator[Any]:
        yield from loader

    def finish(batch: Any) -> tuple[Tensor, Tensor]:
        images, labels = batch
        return (
            mix(images, labels, CLASSES)
            if load.recipe == "full"
            else (images, one_hot(labels, CLASSES, 0.0))
        )

    return Delivery(batches(), finish)
