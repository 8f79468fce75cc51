"""Small exported models of every wiring, and programs that read them, in processes of their own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from pipeline.data.preprocessing import Mode, Preprocessing
from pipeline.export.hub.write import write_folder
from pipeline.export.reload import Exported, ModelDescription, describe_preprocessing
from pipeline.model import build

ROOT = Path(__file__).resolve().parents[2]
CLASSES = 6

# A process for timm or transformers begins like this: torchvision is imported so that it works
# beside a CPU build of torch, and nothing is looked up on the network.
BEGIN = """
import json, sys
from pathlib import Path
import torch
from pipeline.runtime.torchvision_import import import_torchvision
import_torchvision()
torch.set_num_threads(1)
torch.manual_seed(0)
folder = Path(sys.argv[1])
sys.path.insert(0, str(folder))
"""


def exported(size: int = 64, mode: Mode = "published", **network: Any) -> Exported:
    """An untrained network whose every parameter matters, as an exported model."""
    torch.manual_seed(3)
    settings = {"channels": [8, 16, 24, 32], "depths": [1, 2, 1, 1], "columns": 4}
    options: dict[str, Any] = settings | {"num_classes": CLASSES, "activations": "stored"} | network
    model = build(**options).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
        for name, buffer in model.named_buffers():
            if name.endswith("running_var"):
                buffer.uniform_(0.5, 1.5)
    description: ModelDescription = {
        "network": {},
        "preprocessing": describe_preprocessing(Preprocessing(size, mode)),
        "classes": [f"c{label}" for label in range(CLASSES)],
        "class_names": [f"class {label}" for label in range(CLASSES)],
        "trained": {},
        "pipeline": "",
    }
    return Exported(model, description)


def write_hub(folder: Path, model: Exported) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    write_folder(model, folder)
    return folder


def run_python(code: str, *arguments: object, offline: bool = True, **variables: str) -> Any:
    """The last line that a program prints, as JSON. It runs in a process of its own."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | variables
    if offline:
        environment |= {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", BEGIN + code, *map(str, arguments)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.strip().splitlines()[-1])


# What both libraries are compared with.
EXPECTED = """
from safetensors.torch import load_file
expected = load_file(folder.parent / "expected.safetensors")
images, logits = expected["images"], expected["logits"]
image_file = str(folder.parent / "cat.jpg")
"""
