"""The order of an epoch: which view of which sample is at which place, as a pure function of (seed, epoch, position).

Nothing is kept from one place to the next, so that any process can begin anywhere, and the global batches are the same
whatever the number of processes. A *view* is one showing of a sample in an epoch: the number sample + k * num_samples for
the k-th (from 0). Augmentation is keyed by it; where no sample comes twice in an epoch, views are samples.
"""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from pipeline.config.schema import TrainConfig
from pipeline.data.dataset import PreparedDataset
from pipeline.data.hashing import GOLDEN, key_of, mix_array
from pipeline.data.permutation import ROUNDS, permute, permute_one, round_keys
from pipeline.errors import DataError

Views = NDArray[np.int64]


class Order(ABC):
    """The places [0, length) of every epoch, over ``num_samples`` samples."""

    num_samples: int
    length: int

    def index(self, epoch: int, position: int) -> int:
        """The view at ``position`` of ``epoch``."""
        return int(self.indices(epoch, position, position + 1)[0])

    def indices(self, epoch: int, start: int, stop: int) -> Views:
        """The views at positions [start, stop) of ``epoch``: int64, shape (stop - start,). Raises IndexError outside."""
        if not 0 <= start <= stop <= self.length:
            raise IndexError(f"positions {start} to {stop} of {self.length}")
        return self._views(epoch, start, stop) if start < stop else np.zeros(0, dtype=np.int64)

    def shards_near(self, epoch: int, position: int) -> list[int]:
        """The shards that are needed from ``position`` on for some time, the nearest first; none where that may be any."""
        return []

    @abstractmethod
    def _views(self, epoch: int, start: int, stop: int) -> Views:
        """`indices`, of a range that is there and not empty."""


class GlobalOrder(Order):
    """A permutation of all samples; O(1) memory."""

    def __init__(self, num_samples: int, seed: int) -> None:
        if num_samples < 1:
            raise ValueError("an order needs at least one sample")
        self.num_samples = self.length = num_samples
        self.seed = seed

    def index(self, epoch: int, position: int) -> int:
        if not 0 <= position < self.length:
            raise IndexError(f"position {position} of {self.length}")
        return permute_one(position, self.num_samples, round_keys("order", self.seed, epoch))

    def _views(self, epoch: int, start: int, stop: int) -> Views:
        return permute(
            _cells(start, stop), _size(self.num_samples), round_keys("order", self.seed, epoch)
        )


class WindowedOrder(Order):
    """For cold storage: a permutation of the shards, and of the samples within each window of ``window_shards`` of them.

    Every epoch is a permutation of all samples. Places [starts[w], starts[w + 1]) of an epoch need the shards of its window
    w alone, so that those are all that must be near. O(number of shards) memory.

    Args:
        shard_rows: samples of each shard, in the order in which they are numbered.
    """

    def __init__(self, shard_rows: Sequence[int], seed: int, window_shards: int) -> None:
        self.rows = np.asarray(shard_rows, dtype=np.int64)
        if window_shards < 1 or not self.rows.any():
            raise ValueError("a windowed order needs samples, and windows of at least one shard")
        self.num_samples = self.length = int(self.rows.sum())
        self.seed, self.window_shards = seed, window_shards
        self._first = np.cumsum(self.rows) - self.rows  # sample with which each shard begins
        self._shards = GlobalOrder(len(self.rows), key_of("shards", seed))
        self._plan = functools.lru_cache(maxsize=2)(
            self._sequence
        )  # of this epoch and the next; several threads may ask

    def shards(self, epoch: int) -> Views:
        """The shards in the order in which ``epoch`` reads them: int64 (number of shards,). Window w is the slice
        [w * window_shards, (w + 1) * window_shards)."""
        return self._plan(epoch)[0]

    def shards_near(self, epoch: int, position: int) -> list[int]:
        """Those of the window at ``position`` and of the one after it."""
        shards, begins = self._plan(epoch)
        low = (
            (int(np.searchsorted(begins, position, side="right")) - 1)
            // self.window_shards
            * self.window_shards
        )
        near: list[int] = shards[low : low + 2 * self.window_shards].tolist()
        if low + self.window_shards >= len(shards):
            near += [
                shard
                for shard in self.shards(epoch + 1)[: self.window_shards].tolist()
                if shard not in near
            ]
        return near

    def _sequence(self, epoch: int) -> tuple[Views, Views]:
        """The shards of an epoch, and the place at which each begins, and the end."""
        shards = self._shards.indices(epoch, 0, len(self.rows))
        return shards, np.concatenate([[0], np.cumsum(self.rows[shards])])

    def _views(self, epoch: int, start: int, stop: int) -> Views:
        shards, begins = self._plan(epoch)
        parts: list[Views] = []
        while start < stop:
            window = (int(np.searchsorted(begins, start, side="right")) - 1) // self.window_shards
            low = window * self.window_shards
            high = min(low + self.window_shards, len(shards))
            begin, end = int(begins[low]), int(begins[high])
            cells, keys = (
                _cells(start - begin, min(stop, end) - begin),
                round_keys("window", self.seed, epoch, window),
            )
            places = begin + permute(cells, _size(end - begin), keys)
            turn = low + np.searchsorted(begins[low : high + 1], places, side="right") - 1
            parts.append(self._first[shards[turn]] + places - begins[turn])
            start = end
        return np.concatenate(parts)


class BalancedOrder(Order):
    """Classes in shares of n_c^(1 - balance), for a class of n_c samples, in an epoch of as many places as there are samples.

    That is the sampling p_j ~ n_j^q of Kang et al. (Decoupling Representation and Classifier, ICLR 2020, eq. 1) with
    q = 1 - balance: 1 shows every class equally often, 0.5 is the square-root sampling of Mahajan et al. (Exploring the
    Limits of Weakly Supervised Pretraining, 2018). A class's places in an epoch are its share rounded up or down, right on
    average over the epochs (systematic sampling, Madow 1949). They show each of its samples equally often, up to
    one: permuted anew for every round through the class. O(num_samples) memory, 4 bytes a sample.

    Args:
        labels: int64 (num_samples,).
        balance: in [0, 1].
    """

    def __init__(self, labels: NDArray[np.int64], seed: int, balance: float) -> None:
        if len(labels) == 0 or not 0 <= balance <= 1:
            raise ValueError("a balanced order needs samples, and a balance from 0 to 1")
        self.num_samples = self.length = len(labels)
        self.seed = seed
        narrow = np.uint32 if len(labels) < 1 << 32 else np.int64
        self._members = np.argsort(labels, kind="stable").astype(
            narrow
        )  # the samples of the first class, the second, ...
        _, first, counts = np.unique(labels[self._members], return_index=True, return_counts=True)
        self._first, self._counts = first.astype(np.int64), counts.astype(np.int64)
        weights = counts.astype(np.float64) ** (1 - balance)
        self._shares = np.cumsum(weights)[:-1] / weights.sum()

    def _bounds(self, epoch: int) -> NDArray[np.int64]:
        """Class c (of those that have samples) has the cells [bounds[c], bounds[c + 1]) of an epoch."""
        offset = key_of("classes", self.seed, epoch) * 2.0**-64
        inner = np.ceil(self.length * self._shares - offset).astype(np.int64).clip(0, self.length)
        return np.concatenate([[0], inner, [self.length]])

    def _views(self, epoch: int, start: int, stop: int) -> Views:
        bounds = self._bounds(epoch)
        places = permute(
            _cells(start, stop), _size(self.length), round_keys("places", self.seed, epoch)
        )
        classes = np.searchsorted(bounds, places, side="right") - 1
        rounds, cells = np.divmod(places - bounds[classes], self._counts[classes])
        streams = mix_array(
            classes.astype(np.uint64) * np.uint64(GOLDEN)
            + np.uint64(key_of("members", self.seed, epoch))
        )
        streams = mix_array(streams + rounds.astype(np.uint64) * np.uint64(GOLDEN))
        keys = mix_array(
            streams + np.arange(1, ROUNDS + 1, dtype=np.uint64)[:, None] * np.uint64(GOLDEN)
        )
        members = permute(cells.astype(np.uint64), self._counts[classes].astype(np.uint64), keys)
        views: Views = (
            self._members[self._first[classes] + members].astype(np.int64)
            + rounds * self.num_samples
        )
        return views


class RepeatedOrder(Order):
    """Repeated augmentation (Hoffer et al. 2020: Augment Your Batch; Berman et al. 2019: MultiGrain): every place of another
    order ``repeats`` times, as different views, all in one global batch.

    A global batch holds global_batch / repeats places of the other order, first each once, then each again, and so on: the
    repeats of a sample lie far apart, so that mixup pairs different samples and processes get different ones, as with
    timm's RepeatAugSampler, but whatever their number. An epoch is ``repeats`` times as long as the other order's: every
    sample counts, where timm ends an epoch after one repeat-th of them.
    """

    def __init__(self, order: Order, repeats: int, global_batch: int) -> None:
        if repeats < 1 or global_batch % repeats:
            raise ValueError(
                f"a global batch of {global_batch} cannot hold each of its samples {repeats} times"
            )
        self.order, self.repeats, self.global_batch = order, repeats, global_batch
        self.num_samples, self.length = order.num_samples, order.length * repeats

    def shards_near(self, epoch: int, position: int) -> list[int]:
        return self.order.shards_near(
            epoch, position // self.global_batch * (self.global_batch // self.repeats)
        )

    def _views(self, epoch: int, start: int, stop: int) -> Views:
        batch, inside = np.divmod(np.arange(start, stop, dtype=np.int64), self.global_batch)
        different = self.global_batch // self.repeats
        first = batch * different
        repeat, offset = np.divmod(
            inside, np.minimum(different, self.order.length - first)
        )  # the last batch may be smaller
        places = first + offset
        low, high = int(places.min()), int(places.max()) + 1
        earlier, samples = np.divmod(
            self.order.indices(epoch, low, high)[places - low], self.num_samples
        )
        views: Views = samples + (earlier * self.repeats + repeat) * self.num_samples
        return views


def order_of(config: TrainConfig, data: PreparedDataset, seed: int) -> Order:
    """The order in which a training stage reads the split "train". Raises DataError where that is empty."""
    split = data.split("train")
    if not len(split):
        raise DataError(
            "there are no training images",
            place=str(split.directory),
            remedy="add images, and prepare them",
        )
    order: Order
    if config.balance > 0:
        order = BalancedOrder(split.labels, seed, config.balance)
    elif config.order == "windowed":
        rows = [shard.rows for shard in data.description.splits["train"].shards]
        order = WindowedOrder(rows, seed, config.window_shards)
    else:
        order = GlobalOrder(len(split), seed)
    return (
        RepeatedOrder(order, config.repeated_augmentation, config.global_batch)
        if config.repeated_augmentation > 1
        else order
    )


def _cells(start: int, stop: int) -> NDArray[np.uint64]:
    return np.arange(start, stop, dtype=np.uint64)


def _size(size: int) -> NDArray[np.uint64]:
    return np.array([size], dtype=np.uint64)
