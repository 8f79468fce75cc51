"""The loaders that ``bench loader`` compares: the same images in, the same kind of batch out.

That is: normalised float32 batches, shape (n, 3, size, size), with soft targets, shape (n,
classes); with the full recipe after RandAugment, random erasing and mixup or cutmix. Each loader
does its own part and leaves the rest to the device, as in training:

- ours: threads decode, crop, flip and augment into a uint8 batch. The device converts it to float,
  normalises, erases and mixes (`DeviceAugment`).
- pillow: PyTorch's DataLoader over files, decoded by Pillow. Worker processes do everything per
  image, including normalisation and erasing. The device mixes the batch.
- webdataset: tar shards through WebDataset, shuffled in a buffer; otherwise like pillow.
- huggingface: Parquet (our shards) through `datasets.load_dataset`; otherwise like pillow.
"""

from __future__ import annotations

import io
import tarfile
from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypedDict, TypeVar, cast

import torch
from PIL import Image as Pillow
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler

from pipeline.bench.pillow import PillowTransform, mixup_or_cutmix, smoothed_one_hot
from pipeline.config.schema import AugmentConfig
from pipeline.data.dataset import open_dataset
from pipeline.data.device import DeviceAugment
from pipeline.data.loader import Batch, TrainLoader

CLASSES = 1000
TARS = 4  # shards for WebDataset, which divides them among the workers
NO_AUGMENTATION = AugmentConfig(
    randaugment=0, color_jitter=0, random_erasing=0, mixup=0, cutmix=0, smoothing=0
)
RECIPES = {"crop_flip": NO_AUGMENTATION, "full": AugmentConfig()}

AnyBatch = TypeVar("AnyBatch")
ImagesAndLabels = tuple[Tensor, Tensor]
ImagesAndTargets = tuple[Tensor, Tensor]


@dataclass(frozen=True, kw_only=True)
class Workload:
    """The work of one loader.

    directory: as written by `write_layouts`.
    recipe: a key of RECIPES.
    workers: threads of our loader, processes of the others.
    batch: images per batch.
    image_size: side of the square images (pixels).
    """

    directory: str
    recipe: str
    workers: int
    batch: int = 64
    image_size: int = 224


@dataclass(frozen=True)
class BatchSource(Generic[AnyBatch]):
    """Endless batches as a loader hands them over, and the device's part of the work on one."""

    batches: Generator[AnyBatch]
    finish: Callable[[AnyBatch], ImagesAndTargets]


def write_layouts(directory: Path) -> None:
    """Write the images of the prepared dataset ``directory/dataset`` for the other loaders.

    ``files/<label>/<number>.jpg`` for pillow, ``tars/<number>.tar`` for webdataset.
    """
    split = open_dataset(directory / "dataset").split("train")
    (directory / "tars").mkdir()
    with ExitStack() as stack:
        paths = [directory / "tars" / f"{number}.tar" for number in range(TARS)]
        tars = [stack.enter_context(tarfile.open(path, "w")) for path in paths]
        for i in range(len(split)):
            data = bytes(split.image(i))
            label = split.label(i)
            path = directory / "files" / str(label) / f"{i:06d}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
            # WebDataset joins members that differ in their suffix only into one sample.
            for suffix, content in (("jpg", data), ("cls", str(label).encode())):
                member = tarfile.TarInfo(f"{i:06d}.{suffix}")
                member.size = len(content)
                tars[i % TARS].addfile(member, io.BytesIO(content))


def ours(work: Workload) -> BatchSource[Batch]:
    """Our loader over the prepared dataset."""
    augment = RECIPES[work.recipe]
    device = DeviceAugment(augment, CLASSES, seed=0, train=True)

    # Opened inside the generator, so that closing it closes the loader and ends its threads.
    def batches() -> Generator[Batch]:
        split = open_dataset(Path(work.directory) / "dataset").split("train")
        with TrainLoader(
            split,
            seed=0,
            image_size=work.image_size,
            augment=augment,
            global_batch=work.batch,
            micro_batch=work.batch,
            threads=work.workers,
        ) as loader:
            yield from loader

    def finish(batch: Batch) -> ImagesAndTargets:
        output = device(batch.images, batch.labels, batch.views, batch.positions, batch.epoch)
        return output.images, output.targets

    return BatchSource(batches(), finish)


class _Files(Dataset[tuple[Tensor, int]]):
    """A folder of class folders, read as torchvision's ImageFolder reads it."""

    def __init__(self, root: Path, transform: PillowTransform) -> None:
        self.paths = [(str(path), int(path.parent.name)) for path in sorted(root.glob("*/*.jpg"))]
        self.transform = transform

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        path, label = self.paths[i]
        with open(path, "rb") as file:
            return self.transform(Pillow.open(file).convert("RGB")), label


class _Endless(Sampler[int]):
    """Random permutations of ``count`` numbers, one after the other.

    With one permutation per epoch, the workers would run dry and restart between two epochs, which
    would be measured too.
    """

    def __init__(self, count: int) -> None:
        self.count = count

    def __iter__(self) -> Iterator[int]:
        while True:
            yield from torch.randperm(self.count).tolist()


def pillow(work: Workload) -> BatchSource[ImagesAndLabels]:
    """PyTorch's DataLoader over files, with Pillow."""
    files = _Files(Path(work.directory) / "files", _transform(work))
    sampler = _Endless(len(files))
    return _batch_source(
        work, DataLoader(files, work.batch, sampler=sampler, num_workers=work.workers)
    )


class _Decode:
    """Encoded bytes -> transformed image. A class, because worker processes must unpickle it."""

    def __init__(self, transform: PillowTransform) -> None:
        self.transform = transform

    def __call__(self, data: bytes) -> Tensor:
        return self.transform(Pillow.open(io.BytesIO(data)).convert("RGB"))


def webdataset(work: Workload) -> BatchSource[ImagesAndLabels]:
    """WebDataset over tar shards, with Pillow."""
    import webdataset as wds

    urls = [str(path) for path in sorted((Path(work.directory) / "tars").glob("*.tar"))]
    # resampled: tars are drawn at random without end, so that no worker waits at an epoch's end.
    samples = wds.WebDataset(urls, resampled=True, shardshuffle=False).shuffle(200)
    transformed = samples.to_tuple("jpg", "cls").map_tuple(_Decode(_transform(work)), int)
    dataset = cast(IterableDataset[tuple[Tensor, int]], transformed)
    return _batch_source(work, DataLoader(dataset, work.batch, num_workers=work.workers))


class _Columns(TypedDict):
    """Columns of a Hugging Face dataset, as its transform receives them."""

    image: list[Pillow.Image]
    label: list[int]


class _TransformedColumns(TypedDict):
    image: list[Tensor]
    label: list[int]


class _Row(TypedDict):
    """One row of `_TransformedColumns`."""

    image: Tensor
    label: int


class _TransformColumns:
    """The transform of a Hugging Face dataset: columns in, columns out."""

    def __init__(self, transform: PillowTransform) -> None:
        self.transform = transform

    def __call__(self, columns: _Columns) -> _TransformedColumns:
        images = [self.transform(image.convert("RGB")) for image in columns["image"]]
        return {"image": images, "label": columns["label"]}


def _collate(rows: list[_Row]) -> ImagesAndLabels:
    return torch.stack([row["image"] for row in rows]), torch.tensor([row["label"] for row in rows])


def huggingface(work: Workload) -> BatchSource[ImagesAndLabels]:
    """Hugging Face datasets over our Parquet shards, with Pillow."""
    import datasets

    datasets.disable_progress_bars()
    directory = Path(work.directory)
    # The cache is part of the temporary directory: a run must not find the tables of another one.
    files = [str(path) for path in sorted((directory / "dataset").glob("train-*.parquet"))]
    table = datasets.load_dataset(
        "parquet", data_files=files, split="train", cache_dir=str(directory / "cache")
    )
    # The shards have more columns; reading them would cost time that training does not need.
    table = table.select_columns(["image", "label"]).cast_column("image", datasets.Image())
    rows = cast(Dataset[_Row], table.with_transform(_TransformColumns(_transform(work))))
    loader = DataLoader(
        rows,
        work.batch,
        sampler=_Endless(len(table)),
        num_workers=work.workers,
        collate_fn=_collate,
    )
    return _batch_source(work, loader)


LOADERS: dict[str, Callable[[Workload], BatchSource[Any]]] = {
    "ours": ours,
    "pillow": pillow,
    "webdataset": webdataset,
    "huggingface": huggingface,
}
# Packages beyond those that training needs, by loader.
PACKAGES = {"webdataset": ("webdataset",), "huggingface": ("datasets",)}


def _transform(work: Workload) -> PillowTransform:
    return PillowTransform(work.image_size, work.recipe == "full")


def _batch_source(work: Workload, loader: DataLoader[Any]) -> BatchSource[ImagesAndLabels]:
    """The batches of a DataLoader, which the device only mixes."""

    def batches() -> Generator[ImagesAndLabels]:
        yield from loader

    def finish(batch: ImagesAndLabels) -> ImagesAndTargets:
        images, labels = batch
        if work.recipe == "full":
            return mixup_or_cutmix(images, labels, CLASSES)
        return images, smoothed_one_hot(labels, CLASSES, 0.0)

    return BatchSource(batches(), finish)
