"""Writes a folder that timm and transformers read, and that can be uploaded as it lies.

config.json          architecture, labels and preprocessing, in the words of both libraries
model.safetensors    the weights; large ones in several files and an index
modeling_revcol.py   the network (see ``bundle``)
README.md            the model card (see ``card``)
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import Tensor

from pipeline.checkpoint.architecture import CLASSIFIER, last_classifier
from pipeline.checkpoint.description import HUB_NETWORK
from pipeline.data.preprocessing import Preprocessing
from pipeline.export.hub.bundle import bundle
from pipeline.export.hub.shards import write_sharded
from pipeline.export.reload import Exported
from pipeline.files import write_json, write_text
from pipeline.layout import HUB_CODE, HUB_CONFIG
from pipeline.model import Network, NetworkSpec

ARCHITECTURE = "revcol"  # name of the network in timm, of whatever size


def write_folder(model: Exported, folder: Path, dtype: torch.dtype = torch.float32) -> None:
    """Write everything but the card, with weights of ``dtype``.

    Raises:
        OSError, SafetensorError: a file cannot be written.
    """
    state = hub_state(model.network)
    write_sharded(
        folder,
        {
            name: value.to(dtype) if value.is_floating_point() else value
            for name, value in state.items()
        },
    )
    write_json(folder / HUB_CONFIG, hub_config(model))
    write_text(folder / HUB_CODE, bundle())


def hub_state(network: Network) -> dict[str, Tensor]:
    """The weights of the plain network: the last classifier alone, and what it reads."""
    state = network.state_dict()
    head = last_classifier({name: tuple(value.shape) for name, value in state.items()})
    # What lies behind the last classifier does not change its logits.
    columns = tuple(f"columns.{column}." for column in range(_columns(network.spec)))
    chosen: dict[str, Tensor] = {}
    for name, value in state.items():
        if name.startswith(head):
            chosen[CLASSIFIER + name.removeprefix(head)] = value
        elif name.startswith(("stem.", *columns)):
            # alpha has four dimensions, as published: timm then applies weight decay to it.
            chosen[name] = value.view(1, -1, 1, 1) if name.endswith(".alpha") else value
    return chosen


def _columns(spec: NetworkSpec) -> int:
    """Columns that the last classifier reads.

    Example: 5 columns with intermediate supervision have classifiers after columns 1, 2, 3 and 4.
    """
    return spec.supervised_columns[-1] + 1


def hub_config(model: Exported) -> dict[str, object]:
    """``config.json``. timm and transformers each take the keys that they know."""
    spec = model.network.spec
    classes = model.description["classes"]
    names = model.description["class_names"]
    network = json.loads(json.dumps({name: getattr(spec, name) for name in HUB_NETWORK}))
    # Tuples become lists, so that the written and the read configuration are equal.
    network["columns"] = _columns(spec)
    return {
        "architecture": ARCHITECTURE,
        "num_classes": len(classes),
        "num_features": spec.channels[3],
        "global_pool": "avg",
        # Without num_classes, in_chans and global_pool: transformers passes those itself.
        "model_args": network,
        "label_names": classes,
        "label_descriptions": dict(zip(classes, names, strict=True)),
        "preprocessing": model.preprocessing().mode,
        "pretrained_cfg": {
            "tag": "exported",
            "custom_load": False,
            "num_classes": len(classes),
            "fixed_input_size": False,
            "pool_size": None,
            "first_conv": "stem.conv.conv" if spec.blocks[0] == "c2f" else "stem.conv",
            "classifier": f"{CLASSIFIER}linear",
            **timm_pixels(model.preprocessing()),
            "mean": model.description["preprocessing"]["mean"],
            "std": model.description["preprocessing"]["std"],
        },
        # Which transformers derives from the class of the model, unless that is our own.
        "image_processor_type": "TimmWrapperImageProcessor",
        "auto_map": {
            "AutoConfig": f"{Path(HUB_CODE).stem}.RevColConfig",
            "AutoModelForImageClassification": (
                f"{Path(HUB_CODE).stem}.RevColForImageClassification"
            ),
        },
    }


def timm_pixels(preprocessing: Preprocessing) -> dict[str, object]:
    """The transform of timm that equals ``published``, and comes closest to the other ways."""
    size = preprocessing.image_size
    # "squash": timm's word for resizing to the square.
    if not preprocessing.crops:
        return {"input_size": [3, size, size], "crop_pct": 1.0, "crop_mode": "squash"} | _FILTER
    # timm divides by this share and cuts off: 224 / 0.875 = 256.
    share = 1.0 if preprocessing.mode == "whole" else 0.875
    return {"input_size": [3, size, size], "crop_pct": share, "crop_mode": "center"} | _FILTER


# Antialiasing is part of Pillow's filter.
_FILTER: dict[str, object] = {"interpolation": "bicubic"}
