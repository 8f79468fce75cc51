"""Use an exported model.

    from pipeline.export.reload import load_export
    model = load_export("runs/quickstart/export")
    model.predict("cat.jpg")                      # [(class id, name, probability), ...]

Packages that this module imports: torch, safetensors, numpy, opencv (cv2), simplejpeg, Pillow and
xxhash. All but the first two read images exactly as preparation and training do. ray, deepspeed,
pydantic and all other packages of the pipeline are not needed; a test blocks them.

``python -m pipeline.export.reload DIR`` repeats the export's self-test in a fresh process.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NotRequired, TypedDict

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from pipeline.checkpoint.weights_file import verify_weights_file
from pipeline.data.decode import Image
from pipeline.data.image_files import plain_image
from pipeline.data.preprocessing import MEAN, STD, Mode, Preprocessing
from pipeline.errors import CheckpointError, DataError
from pipeline.export import official
from pipeline.files import DIGEST, matches_digest
from pipeline.layout import MODEL_JSON, MODEL_WEIGHTS, PUBLISHED_WEIGHTS, SELF_TEST
from pipeline.model import Network, NetworkSpec

Prediction = tuple[str, str, float]  # class id, name, probability


class PreprocessingDescription(TypedDict):
    """From an image file to the network's input; ``image_size`` in pixels."""

    image_size: int
    mode: NotRequired[Mode]  # see ``data/preprocessing.py``; exports of 0.1.0 have ``resize``
    resize: NotRequired[float]
    mean: list[float]
    std: list[float]
    color: str
    # As the training images were prepared: "apply" turns an image upright, "ignore" does not.
    exif_orientation: NotRequired[str]
    steps: str  # the same in words


def describe_preprocessing(
    preprocessing: Preprocessing, exif_orientation: str = "ignore"
) -> PreprocessingDescription:
    """The entry of ``model.json``. By default, orientation is ignored, as published models do."""
    return {
        "image_size": preprocessing.image_size,
        "mode": preprocessing.mode,
        "mean": list(MEAN),
        "std": list(STD),
        "color": "RGB",
        "exif_orientation": exif_orientation,
        "steps": preprocessing.steps,
    }


class ModelDescription(TypedDict):
    """The content of ``model.json``."""

    network: Mapping[str, object]  # the fields of NetworkSpec
    preprocessing: PreprocessingDescription
    classes: list[str]
    class_names: list[str]
    trained: dict[str, float]  # metrics of the training
    # Name of the split, number of its images, and the metrics on it; if the model was evaluated.
    evaluated: NotRequired[dict[str, str | int | float]]
    # Name of the job, name of the dataset, and the training in the words of a job file. Without
    # paths: a card with them may be published.
    name: NotRequired[str]
    data: NotRequired[str]
    job: NotRequired[str]
    # The file with the published names, or why there is none. Exports of 0.1.0 lack the field.
    published_names: NotRequired[str]
    pipeline: str  # version that exported the model


@dataclass
class Exported:
    """A network in evaluation mode with its preprocessing and class names."""

    network: Network
    description: ModelDescription

    def preprocessing(self) -> Preprocessing:
        """How images are prepared for the network."""
        settings = self.description["preprocessing"]
        mode = settings.get("mode") or ("whole" if settings.get("resize") == 1 else "fast")
        return Preprocessing(settings["image_size"], mode)

    def prepare(self, path: str | Path) -> Tensor:
        """Image file -> (1, 3, H, W), bit for bit as in evaluation.

        Raises:
            DataError: the file cannot be read or decoded.
        """
        settings = self.description["preprocessing"]
        size = settings["image_size"]
        pixels: Image = np.empty((size, size, 3), dtype=np.uint8)
        try:
            upright = settings.get("exif_orientation") == "apply"
            data = plain_image(Path(path).read_bytes(), orientation=upright)
            self.preprocessing().transform()(memoryview(data), pixels)
        except (OSError, ValueError) as error:
            raise DataError(
                f"not a readable image: {error}", place=str(path), remedy="give an image file"
            ) from error
        mean = torch.tensor(settings["mean"]).view(1, 3, 1, 1)
        std = torch.tensor(settings["std"]).view(1, 3, 1, 1)
        images = torch.from_numpy(pixels).permute(2, 0, 1)[None].float()
        # The same order of operations as on the training device, for the same bits.
        return images.mul(1.0 / (255.0 * std)).sub_(mean / std)

    def predict(self, path: str | Path, best: int = 5) -> list[Prediction]:
        """The ``best`` most probable classes of an image file. Raises DataError as ``prepare``."""
        return self.classify(self.prepare(path), best)[0]

    @torch.no_grad()
    def classify(self, images: Tensor, best: int = 5) -> list[list[Prediction]]:
        """The ``best`` most probable classes of each prepared image, (N, 3, H, W)."""
        probabilities = self.network(images).logits[-1].softmax(1)
        values, indices = probabilities.topk(min(best, probabilities.shape[1]))
        classes = self.description["classes"]
        names = self.description["class_names"]
        return [
            [
                (classes[index], names[index], value)
                for value, index in zip(*value_and_index, strict=True)
            ]
            for value_and_index in zip(values.tolist(), indices.tolist(), strict=True)
        ]


def load_export(directory: str | Path) -> Exported:
    """Load an exported model from its folder.

    Raises:
        CheckpointError: a file is missing or damaged, or differs from the digest that it carries.
    """
    directory = Path(directory)
    try:
        description: ModelDescription = json.loads((directory / MODEL_JSON).read_text())
        _verify(directory, description)
        network = make_network(description)
        network.load_state_dict(load_file(directory / MODEL_WEIGHTS), strict=True)
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        raise CheckpointError(
            f"not an exported model: {error}",
            place=str(directory),
            remedy="run the stage 'export', or copy its complete folder",
        ) from error
    return Exported(network.eval(), description)


def _verify(directory: Path, description: ModelDescription) -> None:
    if not matches_digest(description):
        raise CheckpointError(
            "checksum mismatch: the file changed after it was written",
            place=str(directory / MODEL_JSON),
            remedy="run the stage 'export' again; if you changed the file on purpose, remove the "
            f'key "{DIGEST}" from it',
        )
    verify_weights_file(directory / MODEL_WEIGHTS)


def make_network(description: ModelDescription) -> Network:
    """The network that ``model.json`` describes: stored activations, random weights."""
    # The fields of a NetworkSpec are tuples, which JSON stores as lists. How training computed the
    # network does not matter here, and stored activations need the least code.
    network: dict[str, Any] = {
        key: tuple(value) if isinstance(value, list) else value
        for key, value in description["network"].items()
    }
    return Network(NetworkSpec(**(network | {"activations": "stored", "drop_path": 0.0})))


@torch.no_grad()
def self_test(directory: Path) -> float:
    """Largest difference between the training network's logits and those of the exported files.

    The export stores the images and logits of the training network. One thread, because the order
    of floating-point sums depends on the number of threads.
    """
    torch.set_num_threads(1)
    verify_weights_file(directory / SELF_TEST)
    expected = load_file(directory / SELF_TEST)
    images = expected["images"].clone()  # aligned in memory, as those of the export were
    exported = load_export(directory)
    networks = [exported.network]
    if (directory / PUBLISHED_WEIGHTS).is_file():
        weights = torch.load(directory / PUBLISHED_WEIGHTS, weights_only=True)["model"]
        published = make_network(exported.description).eval()
        official.load(published, weights)
        networks.append(published)
    return max(
        float((network(images).logits[-1] - expected["logits"]).abs().max()) for network in networks
    )


if __name__ == "__main__":
    difference = self_test(Path(sys.argv[1]))
    unwanted = sorted({"ray", "deepspeed"} & set(sys.modules))
    print(json.dumps({"difference": difference, "imported": unwanted}))
    sys.exit(0 if difference == 0 and not unwanted else 3)
