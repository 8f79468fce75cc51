"""Classifiers and reconstruction decoders, which read level 3 of a column (paper, section 3.3)."""

from __future__ import annotations

from typing import cast

from torch import Tensor, nn
from torch.nn import functional

from pipeline.blocks.kinds.convnext import ConvNeXtBlock
from pipeline.blocks.layers import CastTo, LayerNorm, Linear
from pipeline.model.spec import Four, NetworkSpec

# Above this number of classes the published models use the simple decoder.
SIMPLE_DECODER_ABOVE = 1000


class Classifier(nn.Module):
    """(N, H, W, C) -> (N, classes) logits: global average pool, norm, linear."""

    def __init__(self, channels: int, num_classes: int, init_scale: float = 1.0) -> None:
        super().__init__()
        self.cast = CastTo()
        self.norm = LayerNorm(channels)
        self.linear = Linear(channels, num_classes, init_scale)

    def forward(self, x: Tensor) -> Tensor:
        # Pool in the precision of the map, before the cast to that of the weights.
        return cast(Tensor, self.linear(self.norm(self.cast(x.mean((1, 2))))))


class DecoderStage(nn.Module):
    """(N, H, W, C) -> (N, 2H, 2W, C'): linear, norm, GELU, bilinear upsampling, ConvNeXt block."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.linear = Linear(inputs, outputs)
        self.norm = LayerNorm(outputs)
        self.block = ConvNeXtBlock(outputs, expansion=1)  # always ConvNeXt, as published

    def forward(self, x: Tensor) -> Tensor:
        x = functional.gelu(self.norm(self.linear(x))).permute(0, 3, 1, 2)
        x = functional.interpolate(x, scale_factor=2, mode="bilinear", align_corners=True)
        return cast(Tensor, self.block(x.permute(0, 2, 3, 1).contiguous()))


class Decoder(nn.Module):
    """Level 3 (N, H, W, C3) -> reconstruction (N, 3, sH, sW) for the network's stride s.

    Three stages reach the stem's stride, and a pixel shuffle the image. For models with up to 1000
    classes.
    """

    def __init__(self, channels: Four, stem_stride: int) -> None:
        super().__init__()
        self.cast = CastTo()
        self.stages = nn.ModuleList(DecoderStage(channels[i], channels[i - 1]) for i in (3, 2, 1))
        self.stem_stride = stem_stride
        # Example: stages that end at stride 4 leave 4x4 pixels of RGB per position.
        self.project = Linear(channels[0], 3 * stem_stride**2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.cast(x)
        for stage in self.stages:
            x = stage(x)
        return functional.pixel_shuffle(self.project(x).permute(0, 3, 1, 2), self.stem_stride)


class SimpleDecoder(nn.Module):
    """Level 3 (N, H, W, C3) -> reconstruction (N, 3, sH, sW) for the network's stride s.

    Norm, linear, pixel shuffle. For models with more than 1000 classes.
    """

    def __init__(self, channels: int, stride: int) -> None:
        super().__init__()
        self.cast = CastTo()
        self.stride = stride
        self.norm = LayerNorm(channels)
        self.project = Linear(channels, 3 * stride**2)

    def forward(self, x: Tensor) -> Tensor:
        pixels = self.project(self.norm(self.cast(x))).permute(0, 3, 1, 2)
        return functional.pixel_shuffle(pixels, self.stride)


def make_decoder(spec: NetworkSpec) -> nn.Module:
    """Make the decoder that the published models use for this number of classes."""
    if spec.num_classes > SIMPLE_DECODER_ABOVE:
        return SimpleDecoder(spec.channels[3], spec.stride)
    return Decoder(spec.channels, spec.stem_stride)
