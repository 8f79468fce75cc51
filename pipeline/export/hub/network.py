"""The network in one file: columns, head, and what timm asks of a model; see ``bundle``."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from pipeline.export.hub.layers import KINDS, LAYER_NORM, channels_first

# --- bundled from here on ---


def _add_upsampled(x: Tensor, coarse: Tensor) -> Tensor:
    size = (x.shape[1], x.shape[2])
    upsampled = functional.interpolate(channels_first(coarse), size=size, mode="nearest")
    return x + upsampled.permute(0, 2, 3, 1)


class PlainLevel(nn.Module):
    """c[t][l] = blocks(down(lower) + up(upper) + up_top(top)) + alpha * c[t - 1][l]."""

    def __init__(
        self, net: RevColNet, column: int, level: int, drop_paths: Sequence[float]
    ) -> None:
        super().__init__()
        channels = net.channels
        block, _, down, up = KINDS[net.blocks[level]]
        # The first column has no column before it; the coarsest level has no coarser one.
        has_upper = column > 0 and level < 3
        has_top = column > 0 and level == 0 and net.huge
        self.down = down(channels[level - 1], channels[level]) if level > 0 else None
        self.up = up(channels[level + 1], channels[level]) if has_upper else None
        self.up_top = up(channels[3], channels[level]) if has_top else None
        self.blocks = nn.ModuleList(block(channels[level], rate) for rate in drop_paths)
        # Four dimensions, as published: weight decay applies to it.
        self.alpha = nn.Parameter(torch.full((1, channels[level], 1, 1), 0.5))

    def forward(self, lower: Tensor, level: int, previous: Sequence[Tensor]) -> Tensor:
        x = lower if self.down is None else self.down(lower)
        if self.up is not None:
            x = _add_upsampled(x, self.up(previous[level + 1]))
        if self.up_top is not None:
            x = _add_upsampled(x, self.up_top(previous[3]))
        for block in self.blocks:
            x = block(x)
        alpha = self.alpha.view(-1)
        if previous:
            return x + alpha * previous[level]
        # In column 0 alpha has no effect. It still gets a gradient, of zero, which DDP expects.
        return x + 0.0 * alpha if torch.is_grad_enabled() else x


class PlainColumn(nn.Module):
    def __init__(self, net: RevColNet, column: int, drop_path: float) -> None:
        super().__init__()
        blocks = sum(net.depths)
        # The rate grows over the blocks of a column from 0. Example: 3 blocks and 0.2: 0, 0.1, 0.2.
        rates = [drop_path * i / max(blocks - 1, 1) for i in range(blocks)]
        begins = [sum(net.depths[:level]) for level in range(5)]
        self.levels = nn.ModuleList(
            PlainLevel(net, column, level, rates[begins[level] : begins[level + 1]])
            for level in range(4)
        )

    def forward(self, x: Tensor, *previous: Tensor) -> tuple[Tensor, ...]:
        maps: list[Tensor] = []
        for i, level in enumerate(self.levels):
            x = level(x, i, previous)
            maps.append(x)
        return tuple(maps)


class PlainClassifier(nn.Module):
    def __init__(self, channels: int, num_classes: int, dropout: float) -> None:
        super().__init__()
        self.norm = LAYER_NORM(channels)
        self.linear = nn.Linear(channels, num_classes) if num_classes else nn.Identity()
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, pooling: str, pre_logits: bool) -> Tensor:
        """(N, H, W, C) -> (N, classes), or a map of them without pooling."""
        # Without pooling, the classifier is applied at every position.
        if pooling:
            x = x.mean((1, 2)) if pooling == "avg" else x.amax((1, 2))
        x = self.dropout(self.norm(x))
        return x if pre_logits else self.linear(x)


class RevColNet(nn.Module):
    """A reversible column network, computed plainly: an image classifier and a feature pyramid.

    Args:
        channels, depths: widths and numbers of blocks of the four levels, finest first.
        columns: number of columns.
        huge: wiring of RevCol-H.
        block: kind of block, one or four: convnext, residual, c2f or transformer.
        stem_stride: stride of the finest level: 4, 2 or 1.
        num_classes: outputs; 0 for features.
        global_pool: "avg", "max", or "" for maps.
        drop_rate: dropout before the classifier. drop_path_rate: stochastic depth.
    """

    classifiers: nn.ModuleList  # of one

    def __init__(
        self,
        channels: Sequence[int] = (64, 128, 256, 512),
        depths: Sequence[int] = (2, 2, 4, 2),
        columns: int = 4,
        huge: bool = False,
        block: str | Sequence[str] = "convnext",
        stem_stride: int = 4,
        num_classes: int = 1000,
        in_chans: int = 3,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.channels = list(channels)
        self.depths = list(depths)
        self.huge = huge
        self.blocks = [block] * 4 if isinstance(block, str) else list(block)
        self.in_chans = in_chans
        self.num_features = self.head_hidden_size = self.channels[3]
        self.drop_rate = drop_rate
        self.grad_checkpointing = False
        # The stem is that of the finest level's blocks.
        self.stem = KINDS[self.blocks[0]][1](in_chans, self.channels[0], stem_stride)
        self.columns = nn.ModuleList(
            PlainColumn(self, column, drop_path_rate) for column in range(columns)
        )
        self.feature_info = [
            {
                "num_chs": width,
                "reduction": stem_stride * 2**level,
                "module": f"columns.{columns - 1}.levels.{level}",
            }
            for level, width in enumerate(self.channels)
        ]
        self.reset_classifier(num_classes, global_pool)
        self.apply(_initialise)
        self.to(device=device, dtype=dtype)

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier; with 0 classes, the pooled and normalised features come out."""
        if global_pool is not None:
            if global_pool not in ("avg", "max", ""):
                raise ValueError(f"global_pool must be 'avg', 'max' or '', got {global_pool!r}")
            self.global_pool = global_pool
        self.num_classes = num_classes
        head = PlainClassifier(self.num_features, num_classes, self.drop_rate)
        if hasattr(self, "classifiers"):
            # The norm belongs to the features.
            head.norm = self.classifiers[0].norm  # type: ignore[assignment]
            weight = next(self.parameters())
            head.to(weight.device, weight.dtype)
        self.classifiers = nn.ModuleList([head]).train(self.training)

    def get_classifier(self) -> nn.Module:
        """The last linear layer."""
        return self.classifiers[0].linear  # type: ignore[return-value]

    def features(self, images: Tensor) -> tuple[Tensor, ...]:
        """The four maps of the last column, (N, H, W, C), finest first."""
        x = self.stem(images)
        maps: tuple[Tensor, ...] = ()
        for column in self.columns:
            # The maps of one column are all that the next one needs.
            if self.grad_checkpointing and self.training:
                maps = checkpoint(column, x, *maps, use_reentrant=False)
            else:
                maps = column(x, *maps)
        return maps

    def forward_features(self, images: Tensor) -> Tensor:
        """The coarsest map, (N, C, H, W)."""
        return channels_first(self.features(images)[-1])

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """The classifier on ``forward_features``; before its linear layer with ``pre_logits``."""
        x = self.classifiers[0](x.permute(0, 2, 3, 1), self.global_pool, pre_logits)
        return x if self.global_pool else channels_first(x)

    def forward(self, images: Tensor) -> Tensor:
        """Logits, (N, classes)."""
        return self.forward_head(self.forward_features(images))

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """The maps of the levels ``indices`` (an int: the last ones), and the coarsest map."""
        # `norm` and `stop_early` change nothing: maps have no norm, and need all columns.
        assert output_fmt == "NCHW", "maps are (N, C, H, W)"
        maps = [channels_first(level) for level in self.features(x)]
        chosen = [maps[i] for i in _levels(indices)]
        return chosen if intermediates_only else (maps[-1], chosen)

    def prune_intermediate_layers(
        self,
        indices: int | Sequence[int] = 1,
        prune_norm: bool = False,
        prune_head: bool = True,
    ) -> list[int]:
        """Remove the classifier, and the levels that the maps of ``indices`` do not need.

        Example: the last column needs levels 0 and 1 for the map of level 1; level 1 reads level 2
        of the column before, and so on. With the wiring of RevCol-H, level 0 reads level 3.
        """
        levels = _levels(indices)
        for distance, column in enumerate(reversed(list(self.columns))):
            deepest = 3 if self.huge and distance else max(levels) + distance
            del column.levels[deepest + 1 :]  # type: ignore[operator, union-attr]
        if prune_head:
            self.reset_classifier(0, "")
        if prune_norm:
            self.classifiers[0].norm = nn.Identity()
        return levels

    def group_matcher(self, coarse: bool = False) -> dict[str, str] | Callable[[str], int]:
        """Groups of the layer-wise learning-rate decay, by the published rule."""
        if coarse:
            return {"stem": r"^stem", "blocks": r"^columns\.(\d+)"}
        return self._depth_of

    def _depth_of(self, name: str) -> int:
        """Stem 0; alpha t + 1; block b of column t b + t + 1; heads after all of them."""
        # A level's down and up modules have the depth of its first block.
        match = re.match(r"columns\.(\d+)\.levels\.(\d)\.(?:(alpha)|blocks\.(\d+)|)", name)
        if match is None:
            return 0 if name.startswith("stem") else sum(self.depths) + len(self.columns)
        column = int(match[1])
        if match[3]:
            return column + 1
        return sum(self.depths[: int(match[2])]) + int(match[4] or 0) + column + 1

    def no_weight_decay(self) -> set[str]:
        """No more parameters than those of one dimension."""
        return set()

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Store only the maps of each column, and compute the rest again in the backward pass."""
        self.grad_checkpointing = enable


def _levels(indices: int | Sequence[int] | None) -> list[int]:
    """Levels by number; an int stands for the last ones, negative numbers count from the end."""
    if indices is None:
        return [0, 1, 2, 3]
    chosen = range(4 - indices, 4) if isinstance(indices, int) else indices
    return [range(4)[level] for level in chosen]


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d | nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
