"""Sizes of a network that follow from a job: parameters, arithmetic and maps. Needs no torch.

Worked example: RevCol-H at 224 pixels with the heads of ImageNet-22K::

    parameters     2.43 billion; 2.16 of them are those of the columns
    forward pass   311 billion multiply-adds per image in stem and columns, 314 with the heads
    level 0        56 x 56 positions of 360 channels; hidden maps of 1440
"""

from __future__ import annotations

from collections.abc import Callable

from pipeline.blocks import registry
from pipeline.blocks.facts import BlockFacts
from pipeline.config.schema import ModelConfig

SIMPLE_DECODER_ABOVE = 1000  # classes; see ``model/heads.py``
SUPERVISED = 4  # columns with a classifier under intermediate supervision; all but one decode
RGB = 3
LEVELS = range(4)


class NetworkSizes:
    """Sizes of one network on images of one size.

    Args:
        image_size: side of the square image (pixels).
        classes: outputs of each classifier.
        supervised: whether the network has the heads of intermediate supervision.
    """

    def __init__(
        self, model: ModelConfig, *, image_size: int, classes: int, supervised: bool
    ) -> None:
        self.model = model
        self.image_size = image_size
        self.classes = classes
        self.supervised = supervised
        names = (model.block,) * 4 if isinstance(model.block, str) else model.block
        self.kinds: list[BlockFacts] = [registry.facts()[name] for name in names]
        # Positions of each level's map per image: 224 pixels -> 3136, 784, 196, 49.
        self.positions = [(image_size / (model.stem_stride << level)) ** 2 for level in LEVELS]

    # Maps

    def map(self, level: int) -> float:
        """Elements of a level's map per image."""
        return self.positions[level] * self.model.channels[level]

    def largest_map(self) -> float:
        """Elements per image of the largest tensor: a hidden map of a block."""
        return max(self.map(level) * self.kinds[level].widest for level in LEVELS)

    # Parameters

    @property
    def parameters(self) -> float:
        """Number of all parameters."""
        return self._columns(self.level_parameters) + self._stem_parameters() + self._heads()

    @property
    def running_statistics(self) -> float:
        """Values of BatchNorm that are no parameters, but belong to the weights."""
        # Its layers have no other vectors than a weight and a bias, and as many statistics.
        with_norms = [kind.running_statistics for kind in self.kinds]
        total = self._columns(lambda level, first: self._vectors(level, first) * with_norms[level])
        return total + self._layer_vectors(0) * with_norms[0]

    def level_parameters(self, level: int, first_column: bool = False) -> float:
        """Parameters of a level of a column."""
        own = self.model.channels[level]
        count = self.model.depths[level] * self.kinds[level].weights * own**2
        if level > 0:
            count += self.kinds[level].down_taps * self.model.channels[level - 1] * own
        sources = self._coarser(level, first_column)
        count += sum(self.model.channels[source] * own for source in sources)
        return count + self._vectors(level, first_column) + own  # its alpha

    def largest_level(self) -> float:
        """Parameters of the largest level of a column."""
        return max(self.level_parameters(level) for level in LEVELS)

    def _coarser(self, level: int, first_column: bool) -> list[int]:
        """The levels of the previous column that a level receives."""
        if first_column:
            return []
        sources = [level + 1] if level < 3 else []
        return [*sources, 3] if level == 0 and self.model.huge else sources

    def _vectors(self, level: int, first_column: bool) -> float:
        """Biases, norms, depthwise filters and layer scales of a level."""
        # One layer from the finer level, and one per coarser map.
        layers = (level > 0) + len(self._coarser(level, first_column))
        blocks = self.model.depths[level] * self.kinds[level].vectors * self.model.channels[level]
        return blocks + layers * self._layer_vectors(level)

    def _layer_vectors(self, level: int) -> float:
        return self.kinds[level].layer_vectors * self.model.channels[level]

    def _stem_parameters(self) -> float:
        return self._stem_taps() * RGB * self.model.channels[0] + self._layer_vectors(0)

    def _stem_taps(self) -> int:
        """Pixels that the stem's convolution sees at once."""
        return 16 if self.model.stem_stride == 4 and self.kinds[0].stem_pooling == 1 else 9

    def _heads(self) -> float:
        deepest = self.model.channels[3]
        # A norm and a linear layer with a bias.
        classifier = self.classes * (deepest + 1) + 2 * deepest
        if not self.supervised:
            return classifier
        return SUPERVISED * classifier + (SUPERVISED - 1) * self._decoder_parameters()

    def _decoder_parameters(self) -> float:
        channels = self.model.channels
        pixels = RGB * self.model.stride**2  # that one position of level 3 stands for
        if self.classes > SIMPLE_DECODER_ABOVE:
            return pixels * (channels[3] + 1) + 2 * channels[3]
        # Each stage: a linear layer and a norm, then a ConvNeXt block that does not expand.
        stages = sum(
            channels[level + 1] * channels[level] + 2 * channels[level] ** 2 + 18 * channels[level]
            for level in (0, 1, 2)
        )
        return stages + RGB * self.model.stem_stride**2 * (channels[0] + 1)

    def _columns(self, of_level: Callable[[int, bool], float]) -> float:
        """The sum of a size over all levels of all columns."""
        # The first column receives no coarser maps, so its levels are smaller.
        first = sum(of_level(level, True) for level in LEVELS)
        others = sum(of_level(level, False) for level in LEVELS)
        return first + (self.model.columns - 1) * others

    # Arithmetic: multiply-adds of a forward pass per image

    def macs(self) -> float:
        """Of the whole network."""
        # A stem that pools computes on finer positions first.
        pooling = min(self.kinds[0].stem_pooling, self.model.stem_stride)
        stem = self._stem_taps() * RGB * self.map(0) * pooling**2
        return stem + self._columns(self._level_macs) + self._head_macs()

    def column_macs(self) -> float:
        """Of all columns: what an inversion or a checkpoint computes again."""
        return self._columns(self._level_macs)

    def _level_macs(self, level: int, first_column: bool) -> float:
        channels = self.model.channels
        kind = self.kinds[level]
        # A weight is used once per position, a depthwise filter too; attention compares all pairs.
        per_value = kind.weights * channels[level] + kind.depthwise
        if kind.attention:
            per_value += 2 * self.positions[level]
        macs = self.model.depths[level] * per_value * self.map(level)
        if level > 0:
            macs += kind.down_taps * channels[level - 1] * self.map(level)
        # Coarser maps are enlarged after their linear layer.
        return macs + sum(
            self.map(source) * channels[level] for source in self._coarser(level, first_column)
        )

    def _head_macs(self) -> float:
        channels = self.model.channels
        classifier = self.classes * channels[3]  # on the mean of all positions
        if not self.supervised:
            return classifier
        if self.classes > SIMPLE_DECODER_ABOVE:
            decoder = RGB * self.model.stride**2 * self.map(3)
        else:
            stages = (
                channels[level] * self.map(level + 1) + (2 * channels[level] + 9) * self.map(level)
                for level in (0, 1, 2)
            )
            decoder = sum(stages) + RGB * self.model.stem_stride**2 * self.map(0)
        return SUPERVISED * classifier + (SUPERVISED - 1) * decoder
