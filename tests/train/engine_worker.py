"""Runs in each of the processes that test_engine.py starts: a small network under DeepSpeed, results as JSON."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from pipeline.checkpoint.manifest import Manifest, list_checkpoints
from pipeline.checkpoint.reader import CheckpointReader
from pipeline.config.schema import TrainConfig
from pipeline.model import NetworkSpec
from pipeline.model.groups import is_alpha
from pipeline.train.engine import make_engine, setup_process
from pipeline.train.loss import compound_terms
from pipeline.train.masters import Masters
from pipeline.train.optim import set_rate
from pipeline.train.state import restore, save_checkpoint
from pipeline.train.world import World

SPEC = NetworkSpec((8, 16, 24, 32), (1, 1, 2, 1), 4, 7, huge=True, supervised=True, activations="stored")
BATCH, SIZE = 8, 32


def batch(step: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(100 + step)
    images = torch.rand(BATCH, 3, SIZE, SIZE, generator=generator)
    return images * 2 - 1, images, torch.randint(0, 7, (BATCH,), generator=generator)


def gathered_now(engine: Any) -> int:
    return sum(p.ds_numel for p in engine.module.parameters() if p.ds_status.name == "AVAILABLE")


def main(options: dict[str, Any]) -> None:
    torch.use_deterministic_algorithms(True)
    world = World.from_environment()
    device = setup_process(world, use_cuda=False, threads=1)
    accumulation = options.get("accumulation", 1)
    config = TrainConfig(
        epochs=1, lr=1e-3, lr_batch=BATCH, global_batch=BATCH, micro_batch=BATCH // world.size // accumulation,
        precision=options["precision"], zero_stage=options["stage"], clip_grad=1.0, ema=0.9, weight_decay=0.05,
    )  # fmt: skip
    assert isinstance(config.micro_batch, int)
    spec = replace(SPEC, activations=options["activations"])
    engine = make_engine(spec, config, world, config.micro_batch, 3, device)
    masters = Masters(engine, config.ema)
    root = Path(options["root"])
    identity: dict[str, Any] = {"test": 1}
    manifest = restore(root, masters, identity, print)
    start = manifest.step if manifest else 0
    losses, after, mismatched = [], 0, 0
    for step in range(start, options["steps"]):
        set_rate(engine.optimizer.param_groups, 1e-3)
        total = torch.zeros(())
        for part in range(accumulation):
            share = config.micro_batch
            begin = world.rank * share * accumulation + part * share
            images, pixels, labels = (tensor[begin : begin + share] for tensor in batch(step))
            out = engine(images, None)
            loss = compound_terms(out, pixels, labels).total
            engine.backward(loss)
            mismatched += int(engine.module.health.mismatched_elements)
            engine.step()
            total += loss.detach() / accumulation
        masters.after_step(step)
        dist.all_reduce(total)
        losses.append(float(total) / world.size)
        if config.zero_stage == 3:
            after = max(after, gathered_now(engine))
    state = {"identity": identity, "optimizer_steps": options["steps"]}
    save_checkpoint(root, masters, options["steps"], state, 3, lambda: True)
    with torch.no_grad():
        masters.use_ema()
        averaged = float(engine.module(batch(0)[0]).logits[-1].double().sum())
        masters.use_masters()
    if world.is_main:
        path = list_checkpoints(root)[0][1]
        manifest = Manifest.read(path)
        reader = CheckpointReader(path, manifest)
        alphas = [reader.full("master", name).abs().min() for name in manifest.shapes if is_alpha(name)]
        result = {"losses": losses, "mismatched": mismatched, "averaged": averaged, "gathered_after": after,
                  "kinds": manifest.kinds, "smallest_alpha": float(min(alphas))}  # fmt: skip
        Path(options["result"]).write_text(json.dumps(result))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
