"""The order of an epoch: which image a training stage reads at which position.

Three words are used here and in the loader, each with one meaning:

- *position*: index into an epoch, 0 .. length - 1. Global batch b holds the positions
  [b * B, (b + 1) * B). Ranks and workers divide the positions among themselves.
- *sample*: row of the split, 0 .. num_samples - 1. Shard 0 holds the first rows, shard 1 the next
  ones, and so on.
- *view*: one showing of a sample within an epoch, ``view = sample + repeat * num_samples`` with
  repeat = 0, 1, 2, ... Augmentation is keyed by the view, so that two views of a sample differ.

Example: a split has 100 samples, and an epoch shows sample 7 twice. Its views are 7 and 107:
``107 % 100`` is the sample again, and ``107 // 100`` the repeat. Where no sample is shown twice,
views and samples are the same numbers.

An order is a pure function of (seed, epoch, position) and keeps no state from one call to the next.
Any process can start at any position, and the global batches are the same for every number of
ranks: a resumed run, or one with another number of ranks, reads exactly the same images.
"""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pipeline.config.schema import TrainConfig
from pipeline.data.class_balance import ClassBalance
from pipeline.data.dataset import PreparedDataset
from pipeline.data.hashing import key_of
from pipeline.data.permutation import permute, permute_one, round_keys
from pipeline.errors import DataError

Int64 = NDArray[np.int64]
Views = Int64


class Order(ABC):
    """Position -> view: ``length`` positions per epoch, over ``num_samples`` samples."""

    num_samples: int
    length: int

    def index(self, epoch: int, position: int) -> int:
        """View at ``position`` of ``epoch``. Raises IndexError outside the epoch."""
        return int(self.indices(epoch, position, position + 1)[0])

    def indices(self, epoch: int, start: int, stop: int) -> Views:
        """Views at positions [start, stop) of ``epoch``: int64, shape (stop - start,).

        Raises:
            IndexError: if the positions are outside the epoch.
        """
        if not 0 <= start <= stop <= self.length:
            raise IndexError(f"positions [{start}, {stop}) are outside [0, {self.length})")
        if start == stop:
            return np.zeros(0, dtype=np.int64)
        return self._views(epoch, start, stop)

    def shards_near(self, epoch: int, position: int) -> list[int]:
        """Shards that are read from ``position`` on, in the order of need, for prefetching.

        Empty if the order reads all shards at all times, so that no prefetching can help.
        """
        return []

    @abstractmethod
    def _views(self, epoch: int, start: int, stop: int) -> Views:
        """`indices`, for positions that are inside the epoch and not empty."""


class GlobalOrder(Order):
    """Shuffles all samples. Needs no table: memory does not grow with the number of samples."""

    def __init__(self, num_samples: int, seed: int) -> None:
        if num_samples < 1:
            raise ValueError("an order needs at least one sample")
        self.num_samples = num_samples
        self.length = num_samples
        self.seed = seed

    def index(self, epoch: int, position: int) -> int:
        if not 0 <= position < self.length:
            raise IndexError(f"position {position} is outside [0, {self.length})")
        return permute_one(position, self.num_samples, round_keys("order", self.seed, epoch))

    def _views(self, epoch: int, start: int, stop: int) -> Views:
        positions = np.arange(start, stop, dtype=np.int64)
        return _permuted(positions, self.num_samples, round_keys("order", self.seed, epoch))


@dataclass(frozen=True)
class ShardSchedule:
    """The shards of one epoch in reading order, and the position at which each begins."""

    shards: Int64  # (num_shards,)
    begins: Int64  # (num_shards + 1,): the last one is the end of the epoch


class WindowedOrder(Order):
    """Shuffles shards, then samples inside windows of shards, for datasets in cold storage.

    A window is a run of ``window_shards`` consecutive shards of the shuffled list of shards. Only
    its shards, plus those of the next window for prefetching, must be on local disk at a time.
    Every epoch visits every sample exactly once. Memory grows with the number of shards only.

    Worked example: shards of 3, 2, 4 and 3 rows, ``window_shards=2``. Suppose that the epoch
    shuffles the shards to [2, 0, 3, 1]:

        position    0  1  2  3 | 4  5  6 || 7  8  9 | 10 11
        shard       2  2  2  2 | 0  0  0 || 3  3  3 |  1  1
        window      0 ------------------ || 1 ------------

    Positions 0..6 are then permuted among themselves, and so are 7..11. A permuted position is
    called a slot here. If position 1 goes to slot 5, which is the second row of shard 0, then
    position 1 shows sample 0 + (5 - 4) = 1.

    Args:
        shard_rows: number of rows of each shard, in row order.
        seed: seed of the run.
        window_shards: shards per window, at least 1. A larger window shuffles better and needs more
            local disk.

    Raises:
        ValueError: if there are no rows or ``window_shards`` is less than 1.
    """

    def __init__(self, shard_rows: Sequence[int], seed: int, window_shards: int) -> None:
        self.rows = np.asarray(shard_rows, dtype=np.int64)
        if window_shards < 1 or not self.rows.any():
            raise ValueError("a windowed order needs samples, and windows of at least one shard")
        self.num_samples = int(self.rows.sum())
        self.length = self.num_samples
        self.seed = seed
        self.window_shards = window_shards
        self._first_sample = np.cumsum(self.rows) - self.rows  # of each shard
        self._shard_order = GlobalOrder(len(self.rows), key_of("shards", seed))
        # Two schedules: this epoch's and the next one's. lru_cache may be called from many threads.
        self._schedule = functools.lru_cache(maxsize=2)(self._make_schedule)

    def shards(self, epoch: int) -> Int64:
        """Shards in the order in which ``epoch`` reads them: int64, shape (num_shards,).

        Window w holds the shards [w * window_shards, (w + 1) * window_shards) of this list.
        """
        return self._schedule(epoch).shards

    def shards_near(self, epoch: int, position: int) -> list[int]:
        """Shards of the window that contains ``position``, then those of the window after it."""
        schedule = self._schedule(epoch)
        window = self._window_at(schedule, position)
        first = window * self.window_shards
        near: list[int] = schedule.shards[first : first + 2 * self.window_shards].tolist()
        if first + self.window_shards >= len(schedule.shards):
            # This is the last window: the next one is the first window of the next epoch, which
            # may share shards with it.
            next_shards = self.shards(epoch + 1)[: self.window_shards].tolist()
            near += [shard for shard in next_shards if shard not in near]
        return near

    def _views(self, epoch: int, start: int, stop: int) -> Views:
        schedule = self._schedule(epoch)
        parts: list[Views] = []
        while start < stop:  # one window per turn: a batch may straddle several
            part = self._views_in_window(schedule, epoch, start, stop)
            parts.append(part)
            start += len(part)
        return np.concatenate(parts)

    def _views_in_window(self, schedule: ShardSchedule, epoch: int, start: int, stop: int) -> Views:
        """Views at positions [start, min(stop, end of the window that contains ``start``))."""
        # 1. Find the window and the positions [begin, end) that it covers.
        #    Example: start = 1 lies in window 0, which covers [0, 7).
        window = self._window_at(schedule, start)
        first = window * self.window_shards
        last = min(first + self.window_shards, len(schedule.shards))
        begin = int(schedule.begins[first])
        end = int(schedule.begins[last])

        # 2. Permute the positions inside the window. The keys include the epoch, so that the order
        #    changes, and the window, so that two windows of equal size are not shuffled alike.
        #    Example: position 1 -> slot 5.
        positions = np.arange(start, min(stop, end), dtype=np.int64)
        keys = round_keys("window", self.seed, epoch, window)
        slots = begin + _permuted(positions - begin, end - begin, keys)

        # 3. A slot belongs to the last shard that begins at or before it; the distance from there
        #    is its row in the shard. Only this window's begins are searched: an empty shard at
        #    its end begins where the next window does.
        #    Example: slot 5 lies in shard 0, which begins at 4, so its row is 1.
        begins = schedule.begins[first : last + 1]
        schedule_indices = first + np.searchsorted(begins, slots, side="right") - 1
        shards = schedule.shards[schedule_indices]
        rows = slots - schedule.begins[schedule_indices]
        samples: Int64 = self._first_sample[shards] + rows
        return samples  # each sample is shown once, so its view is the sample itself

    def _window_at(self, schedule: ShardSchedule, position: int) -> int:
        schedule_index = int(np.searchsorted(schedule.begins, position, side="right")) - 1
        return schedule_index // self.window_shards

    def _make_schedule(self, epoch: int) -> ShardSchedule:
        shards = self._shard_order.indices(epoch, 0, len(self.rows))
        begins = np.concatenate([[0], np.cumsum(self.rows[shards])])
        return ShardSchedule(shards, begins)


class BalancedOrder(Order):
    """Shows classes in proportion to n^(1 - balance), for a class of n samples.

    An epoch has as many positions as there are samples: a rare class is shown several times (each
    time as another view), and a frequent class is shown in part. Positions are shuffled like a
    global order, then `ClassBalance` assigns each slot a class and a sample of it.

    Example: ``balance=1`` with 6 samples of class A (samples 0..5) and 2 of class B (6, 7). Both
    classes get 4 of the 8 positions. One epoch might show the views 2, 7, 14, 0, 15, 5, 6, 3: four
    different samples of A, and both samples of B twice (14 = 6 + 8 and 15 = 7 + 8).

    Args:
        labels: class of each sample, int64, shape (num_samples,).
        balance: from 0 (as the data is) to 1 (every class equally often).

    Raises:
        ValueError: if there are no samples or ``balance`` is out of range.
    """

    def __init__(self, labels: Int64, seed: int, balance: float) -> None:
        if len(labels) == 0 or not 0 <= balance <= 1:
            raise ValueError("a balanced order needs samples, and a balance from 0 to 1")
        self.num_samples = len(labels)
        self.length = len(labels)
        self.seed = seed
        self._classes = ClassBalance(labels, seed, balance)

    def _views(self, epoch: int, start: int, stop: int) -> Views:
        positions = np.arange(start, stop, dtype=np.int64)
        # The name in the key fixes the permutation: renaming it would reorder existing runs.
        slots = _permuted(positions, self.length, round_keys("places", self.seed, epoch))
        samples, repeats = self._classes.assign(epoch, slots)
        views: Views = samples + repeats * self.num_samples
        return views


class RepeatedOrder(Order):
    """Repeats every position of another order ``repeats`` times, as different views.

    This is repeated augmentation (Hoffer et al. 2020, Augment Your Batch; Berman et al. 2019,
    MultiGrain). All views of a sample are in the same global batch, far apart from each other, so
    that mixup pairs different samples and the ranks get different ones. The order inside a batch
    is that of timm's RepeatAugSampler, but independent of the number of ranks. An epoch is
    ``repeats`` times as long as the inner order's: every sample counts, whereas timm ends an epoch
    after 1 / repeats of them.

    Worked example: an inner order of 10 positions, ``repeats=3``, ``global_batch=12``. A batch
    holds 12 / 3 = 4 inner positions, and the last one only 2:

        position          0  1  2  3 | 4  5  6  7 | 8  9 10 11 || .. || 24 25 | 26 27 | 28 29
        inner position    0  1  2  3 | 0  1  2  3 | 0  1  2  3 || .. ||  8  9 |  8  9 |  8  9
        repeat            0          | 1          | 2          || .. ||  0    |  1    |  2

    Raises:
        ValueError: if ``repeats`` is less than 1 or does not divide ``global_batch``.
    """

    def __init__(self, order: Order, repeats: int, global_batch: int) -> None:
        if repeats < 1 or global_batch % repeats:
            raise ValueError(
                f"global_batch {global_batch} is not a multiple of {repeats} repeats per sample"
            )
        self.order = order
        self.repeats = repeats
        self.global_batch = global_batch
        self.num_samples = order.num_samples
        self.length = order.length * repeats

    def shards_near(self, epoch: int, position: int) -> list[int]:
        batch = position // self.global_batch
        return self.order.shards_near(epoch, batch * (self.global_batch // self.repeats))

    def _views(self, epoch: int, start: int, stop: int) -> Views:
        # 1. Global batch, and offset of each position in it. Example: position 27 -> batch 2, 3.
        positions = np.arange(start, stop, dtype=np.int64)
        batches, offsets = np.divmod(positions, self.global_batch)

        # 2. Inner positions per batch; the last batch may have fewer. Example: 4, and 2 in batch 2.
        per_batch = self.global_batch // self.repeats
        first_inner = batches * per_batch
        sizes = np.minimum(per_batch, self.order.length - first_inner)

        # 3. Repeat and inner position. Example: divmod(3, 2) = (1, 1): repeat 1 of position 8 + 1.
        repeats, inner_offsets = np.divmod(offsets, sizes)
        inner_positions = first_inner + inner_offsets

        # 4. Ask the inner order once, for the range that covers them all. Its views may be repeats
        #    already (a balanced order), so number the new ones within each of those.
        low = int(inner_positions.min())
        high = int(inner_positions.max()) + 1
        inner_views = self.order.indices(epoch, low, high)[inner_positions - low]
        inner_repeats, samples = np.divmod(inner_views, self.num_samples)
        views: Views = samples + (inner_repeats * self.repeats + repeats) * self.num_samples
        return views


def order_of(config: TrainConfig, data: PreparedDataset, seed: int) -> Order:
    """The order in which a training stage reads the split "train".

    Raises:
        DataError: if the split is empty.
    """
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
    if config.repeated_augmentation > 1:
        order = RepeatedOrder(order, config.repeated_augmentation, config.global_batch)
    return order


def _permuted(indices: Int64, size: int, keys: NDArray[np.uint64]) -> Int64:
    """Permute ``indices`` with one permutation of [0, size): int64, same shape."""
    return permute(indices.astype(np.uint64), np.array([size], dtype=np.uint64), keys)
