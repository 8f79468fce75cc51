"""Class-balanced sampling: how often an epoch shows each class, and which samples of it.

An epoch of n slots (n is the number of samples) is divided among the classes: class c gets the
slots [bounds[c], bounds[c + 1]). `pipeline.data.order.BalancedOrder` shuffles the slots into
positions.

Weights are n_c^(1 - balance) for a class of n_c samples. This is the sampling p_j ~ n_j^q of Kang
et al. (Decoupling Representation and Classifier, ICLR 2020, eq. 1) with q = 1 - balance: 1 shows
every class equally often, 0.5 is the square-root sampling of Mahajan et al. (Exploring the Limits
of Weakly Supervised Pretraining, 2018).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from pipeline.data.hashing import GOLDEN, key_of, mix_array
from pipeline.data.permutation import ROUNDS, permute

Int64 = NDArray[np.int64]
UInt64 = NDArray[np.uint64]


class ClassBalance:
    """Slot of an epoch -> sample and repeat. Memory: 4 bytes per sample (8 from 2^32 samples on).

    Worked example: ``balance=1``, samples 0..5 of class A and samples 6, 7 of class B. Each class
    gets half of the 8 slots:

        slot                 0  1  2  3 | 4  5 | 6  7
        class                A          | B           bounds = [0, 4, 8]
        round                0          | 0    | 1
        index within round   0  1  2  3 | 0  1 | 0  1

    A round is one pass through the samples of a class, in an order of its own. Class A does not
    finish its first pass; class B makes two. Suppose that round 1 of class B permutes its two
    indices to (1, 0): then slot 6 shows the second sample of B, which is 7, with repeat 1.

    Args:
        labels: class of each sample, int64, shape (num_samples,), at least one.
        balance: from 0 to 1.
    """

    def __init__(self, labels: Int64, seed: int, balance: float) -> None:
        self.num_samples = len(labels)
        self.seed = seed
        # Samples sorted by class: the first class's, then the second's, ... Classes without samples
        # have no entry. 32 bits suffice for any dataset of today and halve the memory.
        sample_type = np.uint32 if len(labels) < 1 << 32 else np.int64
        self._sorted_samples = np.argsort(labels, kind="stable").astype(sample_type)
        _, first, counts = np.unique(
            labels[self._sorted_samples], return_index=True, return_counts=True
        )
        self._first = first.astype(np.int64)  # where each class begins in the sorted samples
        self._counts = counts.astype(np.int64)
        weights = counts.astype(np.float64) ** (1 - balance)
        # Share of an epoch up to the end of each class but the last. Example: [0.5].
        self._cumulative_shares = np.cumsum(weights)[:-1] / weights.sum()

    def assign(self, epoch: int, slots: Int64) -> tuple[Int64, Int64]:
        """Sample of each slot, and how often the epoch shows the sample in earlier rounds.

        Args:
            slots: int64, shape (n,), in [0, num_samples).
        Returns:
            Samples and repeats, both int64, shape (n,).
        """
        # 1. The class whose slots include this one. Example: slot 6 is in [4, 8), so class B.
        bounds = self._bounds(epoch)
        classes = np.searchsorted(bounds, slots, side="right") - 1

        # 2. Round through the class, and index within it. Example: divmod(6 - 4, 2) = (1, 0).
        rounds, indices = np.divmod(slots - bounds[classes], self._counts[classes])

        # 3. Permute the indices: each (class, round) has a permutation of its own.
        keys = self._keys(epoch, classes, rounds)
        sizes = self._counts[classes].astype(np.uint64)
        permuted = permute(indices.astype(np.uint64), sizes, keys)

        # 4. Count from the class's first sample. Example: 6 + 1 = 7.
        samples = self._sorted_samples[self._first[classes] + permuted].astype(np.int64)
        return samples, rounds

    def _bounds(self, epoch: int) -> Int64:
        """Class c (of those that have samples) gets the slots [bounds[c], bounds[c + 1]).

        A share such as 2.5 slots is rounded up or down so that it is right on average over the
        epochs (systematic sampling, Madow 1949): one random offset in [0, 1) per epoch moves all
        bounds. Example: a first class with 2.5 of 10 slots gets ceil(2.5 - offset), which is 3 for
        offsets below 0.5 and else 2.
        """
        offset = key_of("classes", self.seed, epoch) * 2.0**-64
        exact = self.num_samples * self._cumulative_shares
        inner = np.ceil(exact - offset).astype(np.int64).clip(0, self.num_samples)
        return np.concatenate([[0], inner, [self.num_samples]])

    def _keys(self, epoch: int, classes: Int64, rounds: Int64) -> UInt64:
        """Permutation keys of each (class, round): uint64, shape (ROUNDS, n)."""
        # `round_keys` hashes strings one by one; this is its vectorised counterpart for n keys.
        # The name in the key fixes the permutation: renaming it would reorder existing runs.
        golden = np.uint64(GOLDEN)
        epoch_key = np.uint64(key_of("members", self.seed, epoch))
        class_keys = mix_array(classes.astype(np.uint64) * golden + epoch_key)
        keys = mix_array(class_keys + rounds.astype(np.uint64) * golden)
        counters = np.arange(1, ROUNDS + 1, dtype=np.uint64)[:, None]
        return mix_array(keys + counters * golden)
