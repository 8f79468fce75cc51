"""RevCol: stem and columns, as a classification network with heads or as a feature pyramid."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Self, cast

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
from pipeline.model.level_tensors import refuse_functorch
from pipeline.model.reversible import exact_columns
from pipeline.model.spec import Activations, Four, NetworkSpec
from pipeline.model.stream_kernels import kernels_for
from pipeline.model.stream_watch import StreamWatch
from pipeline.model.tracing import exporting, jit_tracing, tracing


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


# torch.export and torch.func look for the tensors inside a network's inputs and outputs.
torch.export.register_dataclass(Output, serialized_type_name="pipeline.model.Output")


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
        skip_on_overflow, skip_on_mismatch: make the gradients non-finite after an overflow of the
            stream, or after a mismatch. For an engine that skips steps with such gradients: any
            other optimizer would write them into the weights. Without ``skip_on_overflow`` the
            network warns once.
        activation_budget: number of stored columns for ``stored_columns: auto``.
    """

    def __init__(self, spec: NetworkSpec) -> None:
        super().__init__()
        self.spec = spec
        self.stem = registry.kind(spec.blocks[0]).stem(spec.channels[0], spec.stem_stride)
        self.columns = nn.ModuleList(Column(spec, t) for t in range(spec.columns))
        initialise(self, spec)
        self.remainder_widths: list[list[int]] | None = None
        self.skip_on_overflow = False
        self.skip_on_mismatch = False
        self.consistency = Consistency(spec.columns, torch.device("cpu"), spec.fraction_bits)
        self.activation_budget = ActivationBudget()
        self.stream_watch = StreamWatch()

    @property
    def uniforms(self) -> int:
        """Random numbers that stochastic depth takes per sample (0 without it)."""
        return self.spec.columns * sum(self.spec.depths) if self.spec.drop_path > 0 else 0

    def compute_in(self, dtype: torch.dtype | None) -> None:
        """Make every part compute in ``dtype``, that of its weights. The stream stays float32."""
        for module in self.modules():
            if isinstance(module, CastTo):
                module.dtype = dtype

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # nn.Module.to, .half, .bfloat16, .double and the like call _apply.
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        dtype = next(self.stem.parameters()).dtype
        # float32 weights compute in the dtype of their inputs or of autocast.
        self.compute_in(None if dtype == torch.float32 else dtype)
        return self

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
        mode = self.spec.activations
        # A traced program is for other runtimes, and an empty batch has nothing to invert: both
        # take the plain path, whose results differ by the stream's resolution.
        if exporting() or images.shape[0] == 0:
            mode = "stored"
        features = self._features
        if mode != "stored" and torch.compiler.is_compiling():
            # Dynamo cannot trace the recompute in the backward pass. It compiles what follows.
            features = torch.compiler.disable(features)
        return features(mode, images, uniforms, taps)

    def _features(
        self, mode: Activations, images: Tensor, uniforms: Tensor | None, taps: tuple[int, ...]
    ) -> tuple[Tensor, ...]:
        """Run stem and columns in ``mode``. See ``features``."""
        if mode == "exact":
            refuse_functorch()
            self._begin_record(images.device)
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
        if mode == "exact":
            maps = self._exact_columns(columns, x, images)
            if not self.skip_on_overflow:
                self.stream_watch.look_at(self.consistency)
            return maps
        if mode == "checkpointed" and torch.is_grad_enabled():
            return checkpointed_columns(columns, x)
        return stored_columns(columns, x)

    def _begin_record(self, device: torch.device) -> None:
        if not self.skip_on_overflow:
            self.stream_watch.look_at(self.consistency)  # of the pass before
        self.consistency = Consistency(self.spec.columns, device, self.spec.fraction_bits)

    def _check_saved_tensors(self, part: nn.Module) -> AbstractContextManager[None]:
        """Return a context for a part outside the columns, which plain autograd differentiates."""
        exact = self.spec.activations == "exact" and not tracing()
        if exact and torch.is_grad_enabled():
            return check_saved_tensors(self.consistency, part, self.skip_on_mismatch)
        return nullcontext()

    def _exact_columns(self, columns: Columns, x: Tensor, images: Tensor) -> tuple[Tensor, ...]:
        exact = ExactContext(
            kernels=kernels_for(self.spec.fused, x.device, x.numel()),
            consistency=self.consistency,
            resolution=fixed_point.make_resolution(self.spec.fraction_bits, x.device),
            remainder_widths=self.remainder_widths,
            skip_on_overflow=self.skip_on_overflow,
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
        if jit_tracing():  # TorchScript has no dataclasses: return the prediction
            return cast(Output, logits[-1])
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
        fraction_bits: resolution 2**-bits and range 2**(31 - bits) of the exact columns' stream.
            Lower it if the network warns that the stream left its range.

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
        fraction_bits: int = 18,
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
            fraction_bits=fraction_bits,
        )
        super().__init__(spec)
        self.channel = list(channels)

    def forward(self, images: Tensor) -> list[Tensor]:
        """(N, 3, H, W) -> the last column's maps (N, C, H', W') at strides 4, 8, 16 and 32."""
        maps = [level.permute(0, 3, 1, 2) for level in self.features(images)]
        # TorchScript asks for a container of fixed length.
        return cast(list[Tensor], tuple(maps)) if jit_tracing() else maps
