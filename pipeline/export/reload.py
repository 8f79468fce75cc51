"""Using an exported model: needs neither ray nor deepspeed.

    from pipeline.export.reload import load_export
    model = load_export("runs/quickstart/export")
    model.predict("cat.jpg")                      # [(class, name, probability), ...]

``python -m pipeline.export.reload DIR`` repeats the export's self-test in a fresh process.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from pipeline.data.augment import EvalTransform
from pipeline.data.decode import Image
from pipeline.errors import CheckpointError, DataError
from pipeline.export import official
from pipeline.model import Network, NetworkSpec


@dataclass
class Exported:
    """A network in evaluation mode with its preprocessing and class names."""

    network: Network
    description: dict[str, Any]

    def prepare(self, path: str | Path) -> Tensor:
        """Image file -> (1, 3, H, W), bit for bit as in evaluation. Raises DataError if it cannot be read or decoded."""
        how = self.description["preprocessing"]
        pixels: Image = np.empty((how["image_size"], how["image_size"], 3), dtype=np.uint8)
        try:
            EvalTransform(how["image_size"], how["resize"])(
                memoryview(Path(path).read_bytes()), pixels
            )
        except (OSError, ValueError) as error:
            raise DataError(
                f"no image that can be read: {error}", place=str(path), remedy="give an image file"
            ) from error
        mean, std = (torch.tensor(how[key]).view(1, 3, 1, 1) for key in ("mean", "std"))
        return (
            torch.from_numpy(pixels)
            .permute(2, 0, 1)[None]
            .float()
            .mul(1.0 / (255.0 * std))
            .sub_(mean / std)
        )

    @torch.no_grad()
    def predict(self, path: str | Path, best: int = 5) -> list[tuple[str, str, float]]:
        """The most probable classes of an image file: (id, name, probability)."""
        probabilities = self.network(self.prepare(path)).logits[-1].softmax(1)[0]
        values, indices = probabilities.topk(min(best, len(probabilities)))
        classes, names = self.description["classes"], self.description["class_names"]
        return [
            (classes[i], names[i], float(v)) for v, i in zip(values, indices.tolist(), strict=True)
        ]


def load_export(directory: str | Path) -> Exported:
    """The exported model. Raises CheckpointError when a file is missing or damaged."""
    directory = Path(directory)
    try:
        description = json.loads((directory / "model.json").read_text())
        network = make_network(description)
        network.load_state_dict(load_file(directory / "model.safetensors"), strict=True)
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        remedy = "run the stage 'export', or copy its folder whole"
        raise CheckpointError(
            f"not an exported model: {error}", place=str(directory), remedy=remedy
        ) from error
    return Exported(network.eval(), description)


def make_network(description: dict[str, Any]) -> Network:
    """The network that ``model.json`` describes, with stored activations and fresh weights."""
    network: dict[str, Any] = {
        key: tuple(value) if isinstance(value, list) else value
        for key, value in description["network"].items()
    }
    return Network(NetworkSpec(**(network | {"activations": "stored", "drop_path": 0.0})))


@torch.no_grad()
def self_test(directory: Path) -> float:
    """Largest difference of logits between the training network (stored in the export) and both exported files, reloaded."""
    torch.set_num_threads(1)
    check = load_file(directory / "selftest.safetensors")
    exported = load_export(directory)
    published = make_network(exported.description).eval()
    official.load(published, torch.load(directory / "revcol.pth", weights_only=True)["model"])
    return max(
        float((net(check["images"]).logits[-1] - check["logits"]).abs().max())
        for net in (exported.network, published)
    )


if __name__ == "__main__":
    difference = self_test(Path(sys.argv[1]))
    unwanted = sorted({"ray", "deepspeed"} & set(sys.modules))
    print(json.dumps({"difference": difference, "imported": unwanted}))
    sys.exit(0 if difference == 0 and not unwanted else 3)
