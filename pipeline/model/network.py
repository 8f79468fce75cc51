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
from pipeline.model.consistency import Consistency, guarded
from pipeline.model.fixed_point_columns import Exactness
from pipeline.model.float_columns import checkpointed_columns, stored_columns
from pipeline.model.heads import Classifier, make_decoder
from pipeline.model.reversible import exact_columns
from pipeline.model.spec import Four, NetworkSpec
from pipeline.model.stream_kernels import choose


@dataclass
class Output:
    """``logits``: one (N, classes) a supervised position, the last being the model's; ``reconstructions``: (N, 3, H, W)
    logits of the input image in [0, 1] at all but the last supervised position (empty for a plain head)."""

    logits: list[Tensor]
    reconstructions: list[Tensor]


class Column(nn.Module):
    """The four levels of one column (a holder of parameters: the pass through all columns is one function)."""

    def __init__(self, spec: NetworkSpec, column: int) -> None:
        super().__init__()
        self.levels = nn.ModuleList(Level(spec, column, level) for level in range(4))


class Backbone(nn.Module):
    """Stem and columns (Cai et al., ICLR 2023). See ``NetworkSpec`` for the shape and the modes.

    ``health`` tells what the last training pass found (exact mode only). ``remainder_widths`` [column][level] (bits) are
    to be set outside the step where reading alpha would synchronise; None: measured in every forward pass. ``skip_on_mismatch``:
    make the gradients non-finite where elements differ, so that the engine skips the step (as it always does where the
    stream left its range).
    """

    def __init__(self, spec: NetworkSpec) -> None:
        super().__init__()
        self.spec = spec
        self.stem = registry.kind(spec.blocks[0]).stem(spec.channels[0])
        self.columns = nn.ModuleList(Column(spec, t) for t in range(spec.columns))
        self.remainder_widths: list[list[int]] | None = None
        self.skip_on_mismatch = True
        self.consistency = Consistency(spec.columns, torch.device("cpu"), spec.fraction_bits)
        self.room = ActivationBudget()

    @property
    def uniforms(self) -> int:
        """Random numbers that one sample's stochastic depth takes (0 without it)."""
        return self.spec.columns * sum(self.spec.depths) if self.spec.drop_path > 0 else 0

    def compute_in(self, dtype: torch.dtype | None) -> None:
        """Make every part compute in ``dtype`` (that of its weights); the residual stream stays float32."""
        for module in self.modules():
            if isinstance(module, CastTo):
                module.dtype = dtype

    def features(
        self, images: Tensor, uniforms: Tensor | None = None, taps: tuple[int, ...] = ()
    ) -> tuple[Tensor, ...]:
        """(level 3 of each column in ``taps`` ..., c0, c1, c2, c3 of the last column), each (N, H, W, C)."""
        if self.spec.activations == "exact":
            self.consistency = Consistency(
                self.spec.columns, images.device, self.spec.fraction_bits
            )
        with self.checked(self.stem):
            x = self.stem(images)
        x = x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
        levels = [
            [cast(Level, level) for level in cast(Column, column).levels] for column in self.columns
        ]
        columns = Columns(levels, self.spec.huge, taps, self._keep(x, uniforms))
        if self.spec.activations == "stored":
            return stored_columns(columns, x)
        if self.spec.activations == "checkpointed" and torch.is_grad_enabled():
            return checkpointed_columns(columns, x)
        if self.spec.activations == "checkpointed":
            return stored_columns(columns, x)
        return self._exact(columns, x, images)

    def checked(self, part: nn.Module) -> AbstractContextManager[None]:
        """Around a part that autograd differentiates as usual: what it keeps is checked with the rest."""
        checking = self.spec.activations == "exact" and torch.is_grad_enabled()
        return guarded(self.consistency, part, self.skip_on_mismatch) if checking else nullcontext()

    def _exact(self, columns: Columns, x: Tensor, images: Tensor) -> tuple[Tensor, ...]:
        exact = Exactness(
            choose(self.spec.fused, x.device, x.numel()),
            self.consistency,
            fixed_point.units_of(self.spec.fraction_bits, x.device),
            self.remainder_widths,
            self.skip_on_mismatch,
            self.spec.compile,
        )
        if self.spec.stored_columns != "auto":
            return exact_columns(columns, x, exact, min(self.spec.stored_columns, columns.count))
        if not torch.is_grad_enabled():
            return exact_columns(columns, x, exact, 0)
        stored = self.room.of(images, columns.count)
        with self.room.measured():
            return exact_columns(columns, x, exact, stored)

    def _keep(self, x: Tensor, uniforms: Tensor | None) -> Tensor | None:
        """Stochastic-depth factors (columns, blocks of a column, N): 0 or 1 / (1 - rate), the rate growing linearly over
        the blocks of a column from 0 to ``drop_path``."""
        blocks, columns, last = sum(self.spec.depths), self.spec.columns, self.spec.drop_path
        if not self.training or last == 0:
            return None
        if uniforms is None:
            uniforms = torch.rand(x.shape[0], self.uniforms, device=x.device)
        kept = (1.0 - torch.arange(blocks, device=x.device) * (last / max(blocks - 1, 1))).view(
            1, -1, 1
        )
        draws = uniforms.view(-1, columns, blocks).permute(1, 2, 0)
        return ((draws < kept).float() / kept).contiguous()


class Network(Backbone):
    """RevCol with classifiers and, under intermediate supervision, reconstruction decoders."""

    def __init__(self, spec: NetworkSpec) -> None:
        super().__init__(spec)
        heads = len(spec.supervised_columns)
        self.classifiers = nn.ModuleList(
            Classifier(spec.channels[3], spec.num_classes, spec.head_init_scale)
            for _ in range(heads)
        )
        self.decoders = nn.ModuleList(
            make_decoder(spec.channels, spec.num_classes) for _ in range(heads - 1)
        )

    def forward(self, images: Tensor, uniforms: Tensor | None = None) -> Output:
        """
        Args:
            images: (N, 3, H, W), normalised.
            uniforms: (N, ``self.uniforms``) in [0, 1) that decide stochastic depth; drawn here when left out in training.
        """
        last = self.spec.columns - 1
        taps = tuple(t for t in self.spec.supervised_columns if t != last)
        maps = self.features(images, uniforms, taps)
        level3s = [*maps[:-4], maps[-1]][: len(self.classifiers)]
        with self.checked(self.classifiers):
            logits = [
                classify(level3).to(level3.dtype)
                for classify, level3 in zip(self.classifiers, level3s, strict=True)
            ]
        with self.checked(self.decoders):
            reconstructions = [
                decode(level3) for decode, level3 in zip(self.decoders, level3s, strict=False)
            ]
        return Output(logits, reconstructions)


class RevCol(Backbone):
    """RevCol as the backbone of a detector or a segmenter: a feature pyramid, for images of any size from 32 pixels on.

        RevCol(kernel="C2f", channels=[32, 64, 96, 128], layers=[2, 3, 6, 3], num_subnet=5, save_memory=True)

    Args:
        kernel: kind of blocks, 'C2f', 'ConvNeXt' or 'transformer', or four of them (one a level).
        channels, layers: widths and blocks of the four levels, finest first.
        num_subnet: columns.
        save_memory: exactly reversible columns; False keeps all activations.
        huge: RevCol-H wiring.
        drop_path: stochastic depth (not for C2f).
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
        super().__init__(
            NetworkSpec(
                cast(Four, tuple(channels)),
                cast(Four, tuple(layers)),
                num_subnet,
                0,
                huge,
                block=cast(str, block),
                activations="exact" if save_memory else "stored",
                drop_path=drop_path,
            )
        )
        self.channel = list(channels)

    def forward(self, images: Tensor) -> list[Tensor]:
        """(N, 3, H, W) -> four maps (N, C, H', W') of the last column, strides 4, 8, 16, 32."""
        return [level.permute(0, 3, 1, 2) for level in self.features(images)]
