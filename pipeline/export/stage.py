"""The export stage: weights, description, preprocessing and class names, checked by reloading in a fresh process."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

import pipeline
from pipeline.blocks import registry
from pipeline.checkpoint.weights import describe, weights_path
from pipeline.config import job_queries
from pipeline.config.schema import Job
from pipeline.data.dataset import open_dataset
from pipeline.data.device import MEAN, STD
from pipeline.errors import ConfigError, StageError
from pipeline.evaluate.network import load_network, preprocessing
from pipeline.export import official
from pipeline.files import atomic, write_json, write_with
from pipeline.layout import RunDir
from pipeline.model import Network

RESULTS = ("loss", "top1", "top5", "steps")  # of the training; its speed is the machine's
SELF_TEST_SIZE = 224  # pixels, at most: what is compared does not depend on it, the time does


def export_stage(job: Job, run_dir: RunDir) -> dict[str, float]:
    """Writes ``export/``: model.safetensors, model.json, selftest.safetensors and, for ConvNeXt blocks as published,
    revcol.pth (published names).

    Metrics: ``parameters``, ``bytes``, ``reload_difference`` (0: logits equal bit for bit in a fresh process).
    """
    stage = job.stages.export
    if stage is None:
        raise ConfigError("the job has no stage 'export'", remedy="add it under `stages`")
    data = open_dataset(run_dir.dataset(job_queries.dataset_name(job, "export")))
    image_size, resize = preprocessing(job, run_dir, stage.initial)
    network = load_network(job, run_dir, stage.initial, data)
    trained = describe(weights_path(run_dir, stage.initial)).get("figures", {})
    description = {
        "network": asdict(network.spec),
        "preprocessing": {
            "image_size": image_size,
            "resize": resize,
            "mean": list(MEAN),
            "std": list(STD),
            "color": "RGB",
            "steps": "short side to image_size * resize (area; cubic where that enlarges), centre crop, / 255, - mean, / std",
        },
        "classes": data.classes,
        "class_names": data.class_names,
        "trained": {name: value for name, value in trained.items() if name in RESULTS},
        "pipeline": pipeline.__version__,
    }
    target = run_dir.export
    try:
        _write(network, description, target)
    except (
        OSError,
        SafetensorError,
        RuntimeError,
    ) as error:  # torch.save reports a full disk as a RuntimeError
        raise StageError(
            f"the export cannot be written: {error}",
            place=str(target),
            remedy="make room, then again",
        ) from error
    return {
        "parameters": float(sum(parameter.numel() for parameter in network.parameters())),
        "bytes": float((target / "model.safetensors").stat().st_size),
        "reload_difference": _reload(target),
    }


def _write(network: Network, description: dict[str, Any], target: Path) -> None:
    # Copies: loaded weights are views of one mapped file, which both formats would take for shared memory.
    state = {name: value.detach().clone() for name, value in network.state_dict().items()}
    write_with(
        target / "model.safetensors", lambda path: save_file(state, path, metadata={"format": "pt"})
    )
    if all(registry.facts()[name].published_names for name in network.spec.blocks):
        published = official.to_published(network, state)
        with atomic(
            target / "revcol.pth"
        ) as file:  # a file, not its name: that would be kept in it
            torch.save({"model": published}, file)
    write_json(target / "model.json", description)
    _write_self_test(
        network, min(SELF_TEST_SIZE, description["preprocessing"]["image_size"]), target
    )


@torch.no_grad()
def _write_self_test(network: Network, image_size: int, target: Path) -> None:
    """Inputs and the training network's logits on one thread, so that another process gives the same bits."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    images = torch.randn(2, 3, image_size, image_size, generator=torch.Generator().manual_seed(0))
    logits = network(images).logits[-1]
    torch.set_num_threads(threads)
    write_with(
        target / "selftest.safetensors",
        lambda path: save_file({"images": images, "logits": logits}, path),
    )


def _reload(target: Path) -> float:
    command = [sys.executable, "-m", "pipeline.export.reload", str(target)]
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=Path(pipeline.__file__).parents[1], check=False
    )
    if done.returncode != 0:
        raise StageError(
            f"the exported model does not reproduce the training network's logits: {done.stdout.strip()} {done.stderr[-2000:]}",
            place=str(target),
            remedy="report this: the export is not usable",
        )
    return float(json.loads(done.stdout.strip().splitlines()[-1])["difference"])
