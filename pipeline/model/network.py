"""RevCol: stem and columns, as a classification network with heads or as a feature pyramid."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from pipeline.blocks import registry
from pipeline.blocks.layers import CastTo
from pipeline.model import fixed_point
from pipeline.model.activation_budget import ActivationBudget
from pipeline.model.column import Columns, Level
from pipeline.model.consistency import Consistency, check_saved_tensors
from pipeline.model.fixed_point_columns import ExactContext
from pipeline.model.float_columns import checkpointed_columns, stored_columns
from pipeline.model.heads import Classifier, make_decoder
from pipeline.model.initialisation import initialise
from pipeline.model.reversible import exact_columns
from pipeline.model.spec import Four, NetworkSpec
from pipeline.model.stream_kernels import kernels_for


@dataclass
class Output:
    """Output of a classification network.

    Attributes:
        logits: (N, classes) per supervised column. The last one is the model's prediction.
        reconstructions: (N, 3, H, W) logits of the input image in [0, 1], per supervised column but
            the last. Empty for a plain head.
    """

    logits: list[Tensor]
    reconstructions: list[Tensor]


class Column(nn.Module):
    """The four levels of one column.

    Holds parameters only and has no forward: one function runs all columns (``exact_columns``,
    ``stored_columns`` or ``checkpointed_columns``).
    """

    def __init__(self, spec: NetworkSpec, column: int) -> None:
        super().__init__()
        self.levels = nn.ModuleList(Level(spec, column, level) for level in range(4))


class Backbone(nn.Module):
    """Stem and columns (Cai et al., ICLR 2023). See ``NetworkSpec`` for the shape and the modes.

    Attributes:
        consistency: record of the newest pass (exact mode only). Every forward pass, also one
            without gradients, replaces it by a new one, and the backward pass completes it. Read
            it, or keep a reference to it, between backward and the next forward.
        remainder_widths: [column][level] bits per remainder (exact mode only). Set them outside the
            step, whenever alpha has changed. None: every forward pass reads alpha, which
            synchronises with the device.
        skip_on_mismatch: make the gradients non-finite after a mismatch, so that the engine skips
            the step. (After an overflow of the stream they always are.)
        activation_budget: number of stored columns for ``stored_columns: auto``.
    """

    def __init__(self, spec: NetworkSpec) -> None:
        super().__init__()
        self.spec = spec
        self.stem = registry.kind(spec.blocks[0]).stem(spec.channels[0], spec.stem_stride)
        self.columns = nn.ModuleList(Column(spec, t) for t in range(spec.columns))
        initialise(self, spec)
        self.remainder_widths: list[list[int]] | None = None
        self.skip_on_mismatch = True
        self.consistency = Consistency(spec.columns, torch.device("cpu"), spec.fraction_bits)
        self.activation_budget = ActivationBudget()

    @property
    def uniforms(self) -> int:
        """Random numbers that stochastic depth takes per sample (0 without it)."""
        return self.spec.columns * sum(self.spec.depths) if self.spec.drop_path > 0 else 0

    def compute_in(self, dtype: torch.dtype | None) -> None:
        """Make every part compute in ``dtype``, that of its weights. The stream stays float32."""
        for module in self.modules():
            if isinstance(module, CastTo):
                module.dtype = dtype

    def features(
        self, images: Tensor, uniforms: Tensor | None = None, taps: tuple[int, ...] = ()
    ) -> tuple[Tensor, ...]:
        """Run stem and columns.

        In exact mode this starts a new ``consistency`` record: read the one of a training pass
        after its backward and before the next call.

        Args:
            images: (N, 3, H, W), normalised.
            uniforms: (N, ``self.uniforms``) in [0, 1), which decide stochastic depth. Drawn here if
                None.
            taps: columns whose level 3 is returned too.

        Returns:
            Level 3 of each tap, then the four maps of the last column, each (N, H, W, C).
        """
        exact = self.spec.activations == "exact"
        if exact:
            self.consistency = Consistency(
                self.spec.columns, images.device, self.spec.fraction_bits
            )
        with self._check_saved_tensors(self.stem):
            x = self.stem(images)
        # The maps stay in float32 (float64 in tests): F's inputs are narrowed where F starts, and
        # its output is added in full precision.
        x = x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
        levels = [
            [cast(Level, level) for level in cast(Column, column).levels] for column in self.columns
        ]
        columns = Columns(
            levels=levels,
            huge=self.spec.huge,
            taps=taps,
            drop_path_scales=self._drop_path_scales(x, uniforms),
        )
        if exact:
            return self._exact_columns(columns, x, images)
        if self.spec.activations == "checkpointed" and torch.is_grad_enabled():
            return checkpointed_columns(columns, x)
        return stored_columns(columns, x)

    def _check_saved_tensors(self, part: nn.Module) -> AbstractContextManager[None]:
        """Return a context for a part outside the columns, which plain autograd differentiates."""
        if self.spec.activations == "exact" and torch.is_grad_enabled():
            return check_saved_tensors(self.consistency, part, self.skip_on_mismatch)
        return nullcontext()

    def _exact_columns(self, columns: Columns, x: Tensor, images: Tensor) -> tuple[Tensor, ...]:
        exact = ExactContext(
            kernels=kernels_for(self.spec.fused, x.device, x.numel()),
            consistency=self.consistency,
            resolution=fixed_point.make_resolution(self.spec.fraction_bits, x.device),
            remainder_widths=self.remainder_widths,
            skip_on_mismatch=self.skip_on_mismatch,
            compiled=self.spec.compile,
        )
        if self.spec.stored_columns != "auto":
            return exact_columns(columns, x, exact, min(self.spec.stored_columns, columns.count))
        # Without gradients nothing is stored, so there is nothing to measure or to decide.
        if not torch.is_grad_enabled():
            return exact_columns(columns, x, exact, 0)
        stored = self.activation_budget.columns_to_store(images, columns.count)
        with self.activation_budget.measuring():
            return exact_columns(columns, x, exact, stored)

    def _drop_path_scales(self, x: Tensor, uniforms: Tensor | None) -> Tensor | None:
        """Return (columns, blocks of a column, N) stochastic-depth factors, or None without it.

        A factor is 0 (skip the block) or 1 / (1 - rate). The rate grows linearly over the blocks of
        a column from 0 to ``drop_path``. Example with 3 blocks and drop_path 0.2: rates 0, 0.1 and
        0.2, factors 1, 1 / 0.9 and 1 / 0.8 where the block is kept.
        """
        blocks = sum(self.spec.depths)
        last_rate = self.spec.drop_path
        if not self.training or last_rate == 0:
            return None
        if uniforms is None:
            uniforms = torch.rand(x.shape[0], self.uniforms, device=x.device)
        rates = torch.arange(blocks, device=x.device) * (last_rate / max(blocks - 1, 1))
        keep_prob = (1.0 - rates).view(1, -1, 1)
        # All columns are drawn at once, before the pass. The recompute reads the same tensor.
        draws = uniforms.view(-1, self.spec.columns, blocks).permute(1, 2, 0)
        return ((draws < keep_prob).float() / keep_prob).contiguous()


class Network(Backbone):
    """RevCol with classifiers and, under intermediate supervision, reconstruction decoders."""

    def __init__(self, spec: NetworkSpec) -> None:
        super().__init__(spec)
        heads = len(spec.supervised_columns)
        self.classifiers = nn.ModuleList(
            Classifier(spec.channels[3], spec.num_classes, spec.head_init_scale)
            for _ in range(heads)
        )
        self.decoders = nn.ModuleList(make_decoder(spec) for _ in range(heads - 1))
        initialise(self.classifiers, spec)
        initialise(self.decoders, spec)

    def forward(self, images: Tensor, uniforms: Tensor | None = None) -> Output:
        """Classify images, and reconstruct them under intermediate supervision.

        Starts a new ``consistency`` record in exact mode; see ``features``.

        Args:
            images: (N, 3, H, W), normalised.
            uniforms: (N, ``self.uniforms``) in [0, 1), which decide stochastic depth. Drawn here if
                None and in training mode.
        """
        # The last column's level 3 is among the four final maps anyway, so it needs no tap.
        last = self.spec.columns - 1
        taps = tuple(t for t in self.spec.supervised_columns if t != last)
        maps = self.features(images, uniforms, taps)
        # (tap, ..., c0, c1, c2, c3) -> (tap, ..., c3). If the number of columns is not a multiple
        # of 4, all four supervised columns are taps, and the slice drops the last column's c3.
        level3_maps = [*maps[:-4], maps[-1]][: len(self.classifiers)]
        with self._check_saved_tensors(self.classifiers):
            logits = [
                classify(level3).to(level3.dtype)
                for classify, level3 in zip(self.classifiers, level3_maps, strict=True)
            ]
        with self._check_saved_tensors(self.decoders):
            # One decoder fewer than maps: the last supervised column has none.
            reconstructions = [
                decode(level3) for decode, level3 in zip(self.decoders, level3_maps, strict=False)
            ]
        return Output(logits, reconstructions)


class RevCol(Backbone):
    """RevCol as the backbone of a detector or a segmenter: a feature pyramid.

        RevCol(kernel="C2f", channels=[32, 64, 96, 128], layers=[2, 3, 6, 3], num_subnet=5,
               save_memory=True)

    Images may have any size from 32 pixels on.

    Args:
        kernel: block kind such as 'C2f' or 'ConvNeXt', or four of them (one per level).
        channels, layers: widths and numbers of blocks of the four levels, finest first.
        num_subnet: number of columns.
        save_memory: exactly reversible columns; False stores all activations.
        huge: wiring of RevCol-H.
        drop_path: stochastic-depth rate (not for kinds without a shortcut, such as C2f).

    Attributes:
        channel: widths of the four maps.
    """

    def __init__(
        self,
        kernel: str | Sequence[str] = "C2f",
        channels: Sequence[int] = (32, 64, 96, 128),
        layers: Sequence[int] = (2, 3, 6, 3),
        num_subnet: int = 5,
        save_memory: bool = True,
        huge: bool = False,
        drop_path: float = 0.0,
    ) -> None:
        block = (
            kernel.lower() if isinstance(kernel, str) else tuple(name.lower() for name in kernel)
        )
        spec = NetworkSpec(
            channels=cast(Four, tuple(channels)),
            depths=cast(Four, tuple(layers)),
            columns=num_subnet,
            num_classes=0,
            huge=huge,
            block=cast(str, block),
            activations="exact" if save_memory else "stored",
            drop_path=drop_path,
        )
        super().__init__(spec)
        self.channel = list(channels)

    def forward(self, images: Tensor) -> list[Tensor]:
        """(N, 3, H, W) -> the last column's maps (N, C, H', W') at strides 4, 8, 16 and 32."""
        return [level.permute(0, 3, 1, 2) for level in self.features(images)]
