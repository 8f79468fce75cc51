"""How much of the devices' arithmetic training uses: MFU and HFU.

MFU counts the arithmetic of the network, three passes of two operations per multiply-add; HFU also
what reversible and checkpointed columns compute again. Example: RevCol-H takes 1.86 TFLOP per image
of 224 pixels, so 150 images/s on one H100 (989 TFLOP/s in bf16) are an MFU of 28%; with every
column inverted, 110 images/s are an MFU of 21% and an HFU of 27%.
"""

from __future__ import annotations

import torch

from pipeline.config.devices import DEVICES, device_named
from pipeline.config.memory import network_sizes
from pipeline.config.speed import image_work
from pipeline.model import Network
from pipeline.monitor import tags
from pipeline.train.context import StageContext


def utilisation(context: StageContext, network: Network, images_per_s: float) -> dict[str, float]:
    """MFU and HFU at a throughput of all processes; {} on a device whose peak is not known."""
    config = context.config
    if context.device.type == "cuda":
        device = device_named(torch.cuda.get_device_name(context.device))
        cores = 1
    else:
        device = DEVICES["cpu"]
        cores = torch.get_num_threads()
    if device is None:
        return {}
    stored = network.spec.stored_columns
    if stored == "auto":  # decided by now, unless the device is still being measured
        stored = network.activation_budget.stored_columns or 0
    sizes = network_sizes(context.job.model, config, context.num_classes)
    work = image_work(sizes, config.precision, min(stored, context.job.model.columns))
    # The devices of a run are alike, so the slowest one decides for all.
    peak = device.peak[config.precision] * cores * context.dist_env.size
    return {
        tags.MFU: images_per_s * work.model_flops / peak,
        tags.HFU: images_per_s * work.executed_flops / peak,
    }
