"""What is known about weights: their network, classes and preprocessing.

Needs no torch where a description lies beside the weights.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from pipeline.errors import CheckpointError
from pipeline.files import matches_digest, with_digest, write_json
from pipeline.layout import (
    HUB_CONFIG,
    MODEL_JSON,
    MODEL_WEIGHTS,
    PUBLISHED_WEIGHTS,
    SHARDED_WEIGHTS,
    WEIGHTS_JSON,
)

SAFETENSORS = ".safetensors"
# Fields of a NetworkSpec that ``config.json`` of a folder for timm has.
HUB_NETWORK = ("channels", "depths", "columns", "huge", "block", "stem_stride")
# Keys of ``weights.json`` as earlier versions wrote them -> the field that replaced them.
_RENAMED = {"figures": "metrics"}
# Preprocessing -> the factor before the crop, which earlier versions recorded in its place.
EARLIER_RESIZE = {"fast": 1.143, "whole": 1.0}


@dataclass(frozen=True, kw_only=True)
class WeightsDescription:
    """The content of ``weights.json``, which lies beside ``weights.safetensors``.

    A training stage fills in every field. The weights of an exported model are described by its
    ``model.json``, which has no step, precision or fingerprint. Weights from elsewhere (published
    ones, a file that was copied alone) have no description: what can be, is read off the weights.
    So every field has a default.
    """

    network: dict[str, object] = field(default_factory=dict)  # the NetworkSpec
    weights: str = ""  # which values: "ema" or "master"
    step: int | None = None  # of the weights
    keep: str = "last"  # why this step: "last" or "best"
    selection_split: str | None = None  # on which it was the best
    classes: list[str] | None = None  # class ids in index order
    image_size: int | None = None  # pixels
    preprocessing: str | None = None  # of the evaluation: see ``data/preprocessing.py``
    precision: str | None = None
    data: str | None = None  # fingerprint of the training data
    metrics: dict[str, float] = field(default_factory=dict)  # accuracies: of these weights
    place: str = ""  # the file that it was read from; not written

    @classmethod
    def read(cls, weights: Path, entry: str = "") -> WeightsDescription:
        """Read the description beside the file ``weights``, or what the weights themselves show.

        Args:
            entry: of a file with several weights.

        Raises:
            CheckpointError: the description, or weights without one, cannot be read.
        """
        for name, of_values in cls._kinds_beside(weights):
            path = weights.with_name(name)
            values = _read_object(path)
            if values is None:
                continue
            try:
                description = of_values(values)
            except (KeyError, TypeError, ValueError) as error:
                raise _unreadable(path, f"{error} is missing or wrong") from error
            if name == HUB_CONFIG and not description.network:
                description = replace(description, network=cls._of_weights(weights, entry).network)
            return replace(description, place=str(path))
        return cls._of_weights(weights, entry)

    @classmethod
    def _of_weights(cls, weights: Path, entry: str) -> WeightsDescription:
        if not weights.is_file():
            return cls()
        from pipeline.checkpoint.undescribed import describe  # imports torch

        return describe(weights, entry)

    @classmethod
    def _kinds_beside(
        cls, weights: Path
    ) -> list[tuple[str, Callable[[dict[str, Any]], WeightsDescription]]]:
        """Names of the descriptions that may lie beside a file, with their readers."""
        if weights.name in (MODEL_WEIGHTS, SHARDED_WEIGHTS):
            return [
                (WEIGHTS_JSON, cls._of_stage),
                (MODEL_JSON, cls._of_export),
                (HUB_CONFIG, cls._of_hub),
            ]
        if weights.name == PUBLISHED_WEIGHTS:
            return [(MODEL_JSON, cls._of_export)]
        return [(WEIGHTS_JSON, cls._of_stage)] if weights.suffix == SAFETENSORS else []

    @classmethod
    def _of_stage(cls, values: dict[str, Any]) -> WeightsDescription:
        for old, new in _RENAMED.items():
            if old in values:
                values.setdefault(new, values.pop(old))
        values.setdefault("preprocessing", _mode_of(values))
        # A newer version may have added fields; they do not matter to this one.
        known = {known.name for known in fields(cls)}
        return cls(**{name: value for name, value in values.items() if name in known})

    @classmethod
    def _of_export(cls, values: dict[str, Any]) -> WeightsDescription:
        pixels = values["preprocessing"]
        return cls(
            network=values["network"],
            classes=list(values["classes"]),
            image_size=pixels["image_size"],
            preprocessing=pixels.get("mode") or _mode_of(pixels),
            metrics=values.get("trained", {}),
        )

    @classmethod
    def _of_hub(cls, values: dict[str, Any]) -> WeightsDescription:
        """Of ``config.json``: a folder exported for timm and transformers, or saved by timm."""
        pixels = values["pretrained_cfg"]
        classes = values.get("label_names") or pixels.get("label_names")
        # timm leaves out the arguments of a model that it saves, unless they are given to it.
        arguments = values.get("model_args")
        network = {key: arguments[key] for key in HUB_NETWORK} if arguments else {}
        return cls(
            network=network and network | {"num_classes": values["num_classes"]},
            classes=list(classes) if classes else None,
            image_size=pixels["input_size"][-1],
            preprocessing=values.get("preprocessing", "published"),  # as timm prepares images
        )

    def write(self, directory: Path) -> None:
        """Write ``weights.json`` into ``directory``."""
        values = asdict(self)
        del values["place"]
        write_json(directory / WEIGHTS_JSON, with_digest(values))


def _mode_of(values: dict[str, Any]) -> str | None:
    """The preprocessing that earlier versions wrote as ``resize``, the factor before the crop."""
    resize = values.get("resize")
    if resize is None:
        return None
    modes = {factor: mode for mode, factor in EARLIER_RESIZE.items()}
    if resize not in modes:
        raise ValueError(f"resize {resize:g}, which this version does not have,")
    return modes[resize]


def _read_object(path: Path) -> dict[str, Any] | None:
    """The JSON object in a file; None without the file."""
    try:
        values = json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise _unreadable(path, str(error)) from error
    if not isinstance(values, dict):
        raise _unreadable(path, "not a JSON object")
    if not matches_digest(values):
        raise _unreadable(path, "checksum mismatch: it changed after it was written")
    return values


def _unreadable(path: Path, cause: str) -> CheckpointError:
    return CheckpointError(
        f"cannot be read ({cause})",
        place=str(path),
        remedy="copy it again from the folder of the stage or the export, or remove it",
    )
