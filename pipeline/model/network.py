"""RevCol: stem, columns, heads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from pipeline.model.column import Level
from pipeline.model.heads import Classifier, make_decoder
from pipeline.model.layers import CastTo, Conv, LayerNorm
from pipeline.model.reversible import Columns, ExactColumns, stored_columns
from pipeline.model.spec import NetworkSpec


@dataclass
class Output:
    """``logits``: one (N, classes) a supervised position, the last being the model's; ``reconstructions``: (N, 3, H, W)
    logits of the input image in [0, 1] at all but the last supervised position (empty for a plain head)."""

    logits: list[Tensor]
    reconstructions: list[Tensor]


class Stem(nn.Module):
    """(N, 3, H, W) -> (N, H/4, W/4, C0): convolution 4x4 stride 4, norm."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.cast = CastTo()
        self.conv = Conv(3, channels, 4, stride=4)
        self.norm = LayerNorm(channels)

    def forward(self, images: Tensor) -> Tensor:
        return cast(Tensor, self.norm(self.conv(self.cast(images.permute(0, 2, 3, 1)))))


class Column(nn.Module):
    """The four levels of one column (a holder of parameters: the pass through all columns is one function)."""

    def __init__(self, spec: NetworkSpec, column: int) -> None:
        super().__init__()
        self.levels = nn.ModuleList(Level(spec, column, level) for level in range(4))


class RevCol(nn.Module):
    """Reversible column network (Cai et al., ICLR 2023). See ``NetworkSpec`` for its shape."""

    def __init__(self, spec: NetworkSpec) -> None:
        super().__init__()
        self.spec = spec
        self.stem = Stem(spec.channels[0])
        self.columns = nn.ModuleList(Column(spec, t) for t in range(spec.columns))
        heads = len(spec.supervised_columns)
        self.classifiers = nn.ModuleList(
            Classifier(spec.channels[3], spec.num_classes, spec.head_init_scale) for _ in range(heads)
        )
        self.decoders = nn.ModuleList(make_decoder(spec.channels, spec.num_classes) for _ in range(heads - 1))
        self.remainder_widths: list[list[int]] | None = None  # [column][level], bits; None: measured in the forward pass
        self.mismatched: list[Tensor] = []  # counts of the last backward pass, on the device

    @property
    def uniforms(self) -> int:
        """Random numbers that one sample's stochastic depth takes (0 without it)."""
        return self.spec.columns * sum(self.spec.depths) if self.spec.drop_path > 0 else 0

    def compute_in(self, dtype: torch.dtype | None) -> None:
        """Make every part compute in ``dtype`` (that of its weights); the residual stream stays float32."""
        for module in self.modules():
            if isinstance(module, CastTo):
                module.dtype = dtype

    def forward(self, images: Tensor, uniforms: Tensor | None = None) -> Output:
        """
        Args:
            images: (N, 3, H, W), normalised.
            uniforms: (N, ``self.uniforms``) in [0, 1) that decide stochastic depth; drawn here when left out in training.
        """
        maps = self.features(images, uniforms)
        taps = [*maps[: len(maps) - 4], maps[-1]][: len(self.classifiers)]
        logits = [classify(level3).to(level3.dtype) for classify, level3 in zip(self.classifiers, taps, strict=True)]
        reconstructions = [decode(level3) for decode, level3 in zip(self.decoders, taps, strict=False)]
        return Output(logits, reconstructions)

    def features(self, images: Tensor, uniforms: Tensor | None = None) -> tuple[Tensor, ...]:
        """(level 3 at each intermediate tap ..., c0, c1, c2, c3 of the last column), each (N, H, W, C)."""
        x = self.stem(images)
        if x.dtype in (torch.bfloat16, torch.float16):
            x = x.float()
        columns = Columns(
            levels=[[cast(Level, level) for level in cast(Column, column).levels] for column in self.columns],
            huge=self.spec.huge,
            taps=tuple(t for t in self.spec.supervised_columns[:-1]) + self._last_tap(),
            keep=self._keep(x, uniforms),
            widths=self.remainder_widths,
        )
        self.mismatched = columns.mismatched
        if self.spec.activations == "exact":
            return cast(tuple[Tensor, ...], ExactColumns.apply(x, columns))  # type: ignore[no-untyped-call]
        return stored_columns(columns, x)

    def _last_tap(self) -> tuple[int, ...]:
        """The last supervised column where it is not the last column (columns not a multiple of 4)."""
        last = self.spec.supervised_columns[-1]
        return (last,) if last != self.spec.columns - 1 else ()

    def _keep(self, x: Tensor, uniforms: Tensor | None) -> list[list[Tensor | None]]:
        """Stochastic-depth factors [column][level] -> (blocks, N): 0 or 1 / (1 - rate)."""
        depths, columns = self.spec.depths, self.spec.columns
        if not self.training or self.spec.drop_path == 0:
            return [[None] * 4 for _ in range(columns)]
        if uniforms is None:
            uniforms = torch.rand(x.shape[0], self.uniforms, device=x.device)
        kept = 1.0 - torch.tensor(self.spec.drop_rates, device=x.device)
        draws = uniforms.view(-1, columns, sum(depths)).permute(1, 2, 0)
        factors = (draws < kept.view(1, -1, 1)).float() / kept.view(1, -1, 1)
        return [list(column.split(list(depths))) for column in factors]
