"""Compares a format with the exported network: the content of ``verification.json``.

    python -m pipeline.export.verification FORMAT FOLDER EXPORT

prints it, in a process that has loaded nothing before. ``FOLDER`` holds the format, ``EXPORT`` the
exported model with its self-test images.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypedDict, cast

import torch
from safetensors.torch import load_file
from torch import Tensor

import pipeline
from pipeline.errors import StageError
from pipeline.export.reload import load_export
from pipeline.layout import EXPORTED_PROGRAM, HUB_CODE, ONNX_MODEL, SELF_TEST
from pipeline.runtime.torchvision_import import import_torchvision

MEASURED_SECONDS = 0.5
Predict = Callable[[Tensor], Tensor]  # images -> logits


class Verification(TypedDict):
    """How a format compares with the exported network on the self-test images, on this CPU."""

    format: str
    libraries: dict[str, str]  # with their versions
    images: int
    largest_difference: float  # of logits
    relative_difference: float  # the same, as a share of the largest logit
    same_argmax: float  # share of the images
    load_seconds: float
    images_per_s: float


@torch.no_grad()
def verify(name: str, folder: Path, export: Path) -> Verification:
    """Load a format, and compare its logits with those of the exported network."""
    # One thread, because the order of floating-point sums depends on the number of threads.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return _verify(name, folder, export)
    finally:
        torch.set_num_threads(threads)


def _verify(name: str, folder: Path, export: Path) -> Verification:
    images = load_file(export / SELF_TEST)["images"]
    expected = load_export(export).network(images).logits[-1]
    start = time.perf_counter()
    predict, libraries = LOADERS[name](folder)
    load_seconds = time.perf_counter() - start
    logits = predict(images)
    # The largest one, not the mean: a wrong class of a single image must show.
    difference = float((logits - expected).abs().max())
    return Verification(
        format=name,
        libraries={library: importlib.metadata.version(library) for library in libraries},
        images=len(images),
        largest_difference=difference,
        relative_difference=difference / float(expected.abs().max()),
        same_argmax=float((logits.argmax(1) == expected.argmax(1)).double().mean()),
        load_seconds=round(load_seconds, 2),
        images_per_s=round(_images_per_s(predict, images), 1),
    )


def _images_per_s(predict: Predict, images: Tensor) -> float:
    start = time.perf_counter()
    passes = 0
    while (elapsed := time.perf_counter() - start) < MEASURED_SECONDS or not passes:
        predict(images)
        passes += 1
    return passes * len(images) / elapsed


def _native(folder: Path) -> tuple[Predict, list[str]]:
    network = load_export(folder).network
    return lambda images: network(images).logits[-1], ["torch"]


def _torch_export(folder: Path) -> tuple[Predict, list[str]]:
    program = torch.export.load(folder / EXPORTED_PROGRAM).module()
    return lambda images: cast(Tensor, program(images)), ["torch"]


def _onnx(folder: Path) -> tuple[Predict, list[str]]:
    runtime = importlib.import_module("onnxruntime")
    options = runtime.SessionOptions()
    # As for torch: comparable speeds, and sums in one order.
    options.intra_op_num_threads = 1
    session = runtime.InferenceSession(
        folder / ONNX_MODEL, options, providers=["CPUExecutionProvider"]
    )

    def predict(images: Tensor) -> Tensor:
        (logits,) = session.run(None, {"images": images.numpy()})
        return torch.from_numpy(logits)

    return predict, ["onnxruntime"]


def _hub(folder: Path) -> tuple[Predict, list[str]]:
    """timm's model; transformers' must give the same logits."""
    import_torchvision()  # timm imports it
    # The code of the folder, and not the parts of this package that it is made of.
    sys.path.insert(0, str(folder))
    importlib.import_module(Path(HUB_CODE).stem)
    timm = importlib.import_module("timm")
    transformers = importlib.import_module("transformers")
    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    other = transformers.AutoModelForImageClassification.from_pretrained(folder).eval()

    def predict(images: Tensor) -> Tensor:
        logits: Tensor = model(images)
        return logits

    def compared(images: Tensor) -> Tensor:
        logits = predict(images)
        if not torch.equal(logits, other(images).logits):
            raise ValueError("timm and transformers compute different logits")
        return logits

    # Once, and not in each pass whose speed is measured.
    compared(torch.zeros(1, 3, 64, 64))
    return predict, ["timm", "transformers", "torch"]


LOADERS: dict[str, Callable[[Path], tuple[Predict, list[str]]]] = {
    "native": _native,
    "torch_export": _torch_export,
    "onnx": _onnx,
    "hub": _hub,
}


def verify_in_fresh_process(name: str, folder: Path, export: Path) -> Verification:
    """``verify`` in a process of its own.

    Raises:
        StageError: the format cannot be loaded.
    """
    command = [sys.executable, "-m", __name__, name, str(folder), str(export)]
    root = Path(pipeline.__file__).parents[1]
    completed = subprocess.run(command, capture_output=True, text=True, cwd=root, check=False)
    if completed.returncode != 0:
        raise StageError(
            f"the exported {name} cannot be loaded: {completed.stderr[-2000:]}",
            place=str(folder),
            remedy=f"leave {name} out of the formats, and report the error",
        )
    return cast(Verification, json.loads(completed.stdout.strip().splitlines()[-1]))


if __name__ == "__main__":
    print(json.dumps(verify(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]))))
