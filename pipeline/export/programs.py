"""Programs for other runtimes: torch.export and ONNX, of the plain network in one file.

The example batch has two images, because a dimension of 1 would be taken for a constant.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn
from torch.export import Dim

from pipeline.data.preprocessing import MEAN, STD
from pipeline.export.hub.network import RevColNet
from pipeline.export.hub.write import hub_config, hub_state
from pipeline.export.reload import Exported
from pipeline.layout import EXPORTED_PROGRAM, ONNX_FEATURES, ONNX_MODEL, ONNX_UINT8_MODEL

OPSET = 20
EXTERNAL_BYTES = 1_900_000_000  # of weights; a protocol buffer holds at most 2 GiB
ANY_BATCH = {0: Dim("batch")}
ANY_SIZE = dict.fromkeys((0, 2, 3), Dim.DYNAMIC)


def plain_network(model: Exported) -> RevColNet:
    """The exported network as others see it: one classifier, stored activations."""
    arguments = hub_config(model)["model_args"]
    assert isinstance(arguments, dict)
    network = RevColNet(num_classes=len(model.description["classes"]), **arguments)
    # Strict: a parameter that is missing here would be random in every format.
    network.load_state_dict(hub_state(model.network))
    return network.eval()


class Pyramid(nn.Module):
    """(N, 3, H, W) -> the four maps of the last column, (N, C, H', W')."""

    def __init__(self, network: RevColNet) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> list[Tensor]:
        maps = self.network.forward_intermediates(images, intermediates_only=True)
        return cast(list[Tensor], maps)


class FromPixels(nn.Module):
    """Normalisation, then the network: uint8 (N, H, W, 3) -> logits."""

    scale: Tensor
    shift: Tensor

    def __init__(self, network: RevColNet) -> None:
        super().__init__()
        self.network = network
        std = torch.tensor(STD)
        self.register_buffer("scale", 1.0 / (255.0 * std))
        self.register_buffer("shift", torch.tensor(MEAN) / std)

    def forward(self, pixels: Tensor) -> Tensor:
        # The same order of operations as in training and evaluation.
        images = pixels.float() * self.scale - self.shift
        logits: Tensor = self.network(images.permute(0, 3, 1, 2))
        return logits


@torch.no_grad()
def write_torch_export(model: Exported, folder: Path) -> None:
    """Write a program that needs torch alone, for any number of images."""
    network = plain_network(model)
    images = _example(model)
    program = torch.export.export(network, (images,), dynamic_shapes=(ANY_BATCH,))
    torch.export.save(program, folder / EXPORTED_PROGRAM)


@torch.no_grad()
def write_onnx(
    model: Exported,
    folder: Path,
    names: Sequence[str] = (ONNX_MODEL, ONNX_UINT8_MODEL, ONNX_FEATURES),
) -> None:
    """Write the classifier, the same from pixels, and the pyramid for images of any size."""
    network = plain_network(model)
    images = _example(model)
    size = model.preprocessing().image_size
    pixels = torch.zeros(2, size, size, 3, dtype=torch.uint8)
    # Two different sides, so that they are not taken for the same number.
    # A multiple of the stride, as the other sides, so that no rule for odd sizes is recorded.
    any_image = torch.zeros(2, 3, size, size + model.network.spec.stride)
    maps = [f"stride{model.network.spec.stem_stride * 2**level}" for level in range(4)]
    for name, module, example, (inputs, outputs, shapes) in (
        (ONNX_MODEL, network, images, (["images"], ["logits"], ANY_BATCH)),
        (ONNX_UINT8_MODEL, FromPixels(network).eval(), pixels, (["pixels"], ["logits"], ANY_BATCH)),
        (ONNX_FEATURES, Pyramid(network).eval(), any_image, (["images"], maps, ANY_SIZE)),
    ):
        if name not in names:
            continue
        with warnings.catch_warnings():
            # Of one part of PyTorch about another one.
            warnings.filterwarnings("ignore", category=FutureWarning)
            program = torch.onnx.export(
                module,
                (example,),
                dynamo=True,
                opset_version=OPSET,
                input_names=inputs,
                output_names=outputs,
                dynamic_shapes=(shapes,),
                verbose=False,
            )
        assert program is not None
        # Whoever has the file alone can prepare images and name the classes.
        program.model.metadata_props.update(_metadata(model))
        program.save(folder / name, external_data=_bytes(network) > EXTERNAL_BYTES)


def _example(model: Exported) -> Tensor:
    size = model.preprocessing().image_size
    return torch.zeros(2, 3, size, size)


def _bytes(network: nn.Module) -> int:
    return sum(value.numel() * value.element_size() for value in network.state_dict().values())


def _metadata(model: Exported) -> dict[str, str]:
    """What a user needs besides the program, as text: JSON."""
    description = model.description
    return {
        "preprocessing": json.dumps(description["preprocessing"]),
        "classes": json.dumps(description["classes"]),
        "class_names": json.dumps(description["class_names"]),
    }
