"""The export stage: weights, description, preprocessing and class names, checked by reloading in a fresh process."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors.torch import save_file

import pipeline
from pipeline.config import resolve
from pipeline.config.schema import Job
from pipeline.data.device import MEAN, STD
from pipeline.data.format import open_dataset
from pipeline.errors import ConfigError, StageError
from pipeline.evaluate.classify import load_network
from pipeline.export import official
from pipeline.files import write_json, write_with


def export_stage(job: Job, run_dir: Path) -> dict[str, float]:
    """Writes ``export/``: model.safetensors, model.json, revcol.pth (published names), selftest.safetensors.

    Figures: ``parameters``, ``bytes``, ``reload_difference`` (0: logits equal bit for bit in a fresh process).
    """
    stage = job.stages.export
    if stage is None:
        raise ConfigError("the job has no stage 'export'", remedy="add it under `stages`")
    config = resolve.train_config(job, stage.initial)
    data = open_dataset(run_dir / "stages" / "prepare" / resolve.dataset_name(job, stage.initial))
    network = load_network(job, run_dir, stage.initial, len(data.classes))
    target = run_dir / "export"
    state = {name: parameter.detach().contiguous() for name, parameter in network.named_parameters()}
    write_with(target / "model.safetensors", lambda path: save_file(state, path, metadata={"format": "pt"}))
    published = {name: value.clone() for name, value in official.to_published(network).items()}
    write_with(target / "revcol.pth", lambda path: torch.save({"model": published}, path))
    description = {
        "network": asdict(network.spec),
        "preprocessing": {"image_size": config.image_size, "resize": config.eval_resize, "mean": list(MEAN), "std": list(STD),
                          "interpolation": "area", "color": "RGB"},
        "classes": data.classes,
        "class_names": data.class_names,
        "trained": json.loads((run_dir / "stages" / stage.initial / "weights.json").read_text())["figures"],
        "pipeline": pipeline.__version__,
    }  # fmt: skip
    write_json(target / "model.json", description)
    _write_self_test(network, config.image_size, target)
    return {
        "parameters": float(sum(value.numel() for value in state.values())),
        "bytes": float((target / "model.safetensors").stat().st_size),
        "reload_difference": _reload(target),
    }


@torch.no_grad()
def _write_self_test(network: torch.nn.Module, image_size: int, target: Path) -> None:
    """Inputs and the training network's logits on one thread, so that another process gives the same bits."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    images = torch.randn(2, 3, image_size, image_size, generator=torch.Generator().manual_seed(0))
    logits = network(images).logits[-1]
    torch.set_num_threads(threads)
    write_with(target / "selftest.safetensors", lambda path: save_file({"images": images, "logits": logits}, path))


def _reload(target: Path) -> float:
    command = [sys.executable, "-m", "pipeline.export.reload", str(target)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(pipeline.__file__).parents[1], check=False)
    if done.returncode != 0:
        raise StageError(
            f"the exported model does not reproduce the training network's logits: {done.stdout.strip()} {done.stderr[-2000:]}",
            place=str(target),
            remedy="report this: the export is not usable",
        )
    return float(json.loads(done.stdout.strip().splitlines()[-1])["difference"])
