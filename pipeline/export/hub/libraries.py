"""The network in one file for timm and transformers, where they are installed; see ``bundle``."""

from __future__ import annotations

import importlib
from typing import Any

from torch import Tensor, nn
from torch.nn import functional

from pipeline.export.hub.network import RevColNet

# --- bundled from here on ---

_SMALL = {"channels": (64, 128, 256, 512), "depths": (2, 2, 4, 2)}
_LARGE = {"depths": (1, 2, 6, 2), "columns": 8}
SIZES: dict[str, dict[str, Any]] = {
    "revcol": {},  # whatever its arguments say
    "revcol_tiny": {**_SMALL, "columns": 4},
    "revcol_small": {**_SMALL, "columns": 8},
    "revcol_base": {"channels": (72, 144, 288, 576), "depths": (1, 1, 3, 2), "columns": 16},
    "revcol_large": {**_LARGE, "channels": (128, 256, 512, 1024)},
    "revcol_xlarge": {**_LARGE, "channels": (224, 448, 896, 1792)},
    "revcol_huge": {**_LARGE, "channels": (360, 720, 1440, 2880), "huge": True},
}


def _library(name: str) -> Any:
    """A library that is not needed to compute; None where it is not installed."""
    try:
        return importlib.import_module(name)
    except ImportError:
        return None


_timm = _library("timm.models")
# The file may be imported twice: under its own name, and by transformers under another.
if _timm is not None and not _timm.is_model("revcol"):
    _CFG = {
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": (7, 7),
        "crop_pct": 0.875,
        "interpolation": "bicubic",
        "mean": (0.485, 0.456, 0.406),
        "std": (0.229, 0.224, 0.225),
        "first_conv": "stem.conv",
        "classifier": "classifiers.0.linear",
        "license": "apache-2.0",
    }
    default_cfgs = _timm.generate_default_cfgs({f"{name}.untrained": _CFG for name in SIZES})

    def _register(name: str) -> None:
        def create(pretrained: bool = False, **options: Any) -> nn.Module:
            model: nn.Module = _timm.build_model_with_cfg(
                RevColNet,
                name,
                pretrained,
                feature_cfg={"out_indices": (0, 1, 2, 3), "feature_cls": "getter"},
                **{**SIZES[name], **options},
            )
            return model

        # timm registers a function under its name.
        create.__name__ = name
        create.__doc__ = f"RevCol {name.removeprefix('revcol').strip('_')}"
        _timm.register_model(create)

    for _name in SIZES:
        _register(_name)

_transformers = _library("transformers")
if _transformers is not None:
    _Config: Any = _transformers.PretrainedConfig
    _Model: Any = _transformers.PreTrainedModel

    class RevColConfig(_Config):  # type: ignore[misc]
        """``config.json`` as transformers sees it: the arguments of the network, and the labels."""

        model_type = "revcol"

        def __init__(
            self,
            model_args: dict[str, Any] | None = None,
            num_classes: int = 1000,
            label_names: list[str] | None = None,
            label_descriptions: dict[str, str] | None = None,
            **options: Any,
        ) -> None:
            # The labels are those that transformers takes for a model of timm.
            if label_names and "id2label" not in options:
                options["id2label"] = dict(enumerate(label_names))
                options["label2id"] = {name: label for label, name in enumerate(label_names)}
            elif "id2label" not in options:
                options.setdefault("num_labels", num_classes)
            super().__init__(**options)
            self.model_args = model_args or {}
            self.num_classes = num_classes
            self.label_names = label_names
            self.label_descriptions = label_descriptions

    class RevColForImageClassification(_Model):  # type: ignore[misc]
        """The classifier of transformers; with ``labels`` also the cross entropy."""

        # Weights of the folder have no prefix. transformers puts them below the module that
        # `base_model_prefix` names.
        config_class = RevColConfig
        main_input_name = "pixel_values"
        base_model_prefix = "network"
        supports_gradient_checkpointing = False

        def __init__(self, config: RevColConfig) -> None:
            super().__init__(config)
            self.network = RevColNet(num_classes=config.num_labels, **config.model_args)
            self.post_init()

        def _init_weights(self, module: nn.Module) -> None:
            """The network has drawn its weights itself."""

        def forward(
            self,
            pixel_values: Tensor,
            labels: Tensor | None = None,
            output_hidden_states: bool | None = None,
            **options: Any,
        ) -> Any:
            # Maps are computed anyway, but most callers do not want to keep them.
            logits, maps = None, None
            if output_hidden_states:
                last, chosen = self.network.forward_intermediates(pixel_values)
                logits = self.network.forward_head(last)
                maps = tuple(chosen)
            else:
                logits = self.network(pixel_values)
            loss = None if labels is None else functional.cross_entropy(logits, labels)
            return _transformers.modeling_outputs.ImageClassifierOutput(
                loss=loss, logits=logits, hidden_states=maps
            )
