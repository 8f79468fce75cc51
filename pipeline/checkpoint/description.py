"""What is known about weights: their network, classes and preprocessing. Needs no torch."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from pipeline.errors import CheckpointError
from pipeline.files import matches_digest, with_digest, write_json
from pipeline.layout import MODEL_JSON, MODEL_WEIGHTS, WEIGHTS_JSON

# Keys of ``weights.json`` as earlier versions wrote them -> the field that replaced them.
_RENAMED = {"figures": "metrics"}


@dataclass(frozen=True, kw_only=True)
class WeightsDescription:
    """The content of ``weights.json``, which lies beside ``weights.safetensors``.

    A training stage fills in every field. The weights of an exported model are described by its
    ``model.json``, which has no step, precision or fingerprint. Weights from elsewhere (published
    ones, a file that was copied alone) have no description or a partial one, so every field has a
    default.
    """

    network: dict[str, object] = field(default_factory=dict)  # the NetworkSpec
    weights: str = ""  # which values: "ema" or "master"
    step: int | None = None  # of the weights
    keep: str = "last"  # why this step: "last" or "best"
    selection_split: str | None = None  # on which it was the best
    classes: list[str] | None = None  # class ids in index order
    image_size: int | None = None  # pixels
    resize: float | None = None  # short side before the centre crop, as a multiple of image_size
    precision: str | None = None
    data: str | None = None  # fingerprint of the training data
    metrics: dict[str, float] = field(default_factory=dict)  # accuracies: of these weights

    @classmethod
    def read(cls, weights: Path) -> WeightsDescription:
        """Read the description beside the file ``weights``. Without one, every field is empty.

        Raises:
            CheckpointError: the file exists but is not a description.
        """
        path = weights.with_name(WEIGHTS_JSON)
        values = _read_object(path)
        if values is None and weights.name == MODEL_WEIGHTS:
            path = weights.with_name(MODEL_JSON)
            values = _read_object(path)
            if values is not None:
                return cls._of_export(values, path)
        if values is None:
            return cls()
        for old, new in _RENAMED.items():
            if old in values:
                values.setdefault(new, values.pop(old))
        # A newer version may have added fields; they do not matter to this one.
        known = {known.name for known in fields(cls)}
        return cls(**{name: value for name, value in values.items() if name in known})

    @classmethod
    def _of_export(cls, values: dict[str, Any], path: Path) -> WeightsDescription:
        try:
            return cls(
                network=values["network"],
                classes=list(values["classes"]),
                image_size=values["preprocessing"]["image_size"],
                resize=values["preprocessing"]["resize"],
                metrics=values.get("trained", {}),
            )
        except (KeyError, TypeError) as error:
            raise _unreadable(path, f"{error} is missing or wrong") from error

    def write(self, directory: Path) -> None:
        """Write ``weights.json`` into ``directory``."""
        write_json(directory / WEIGHTS_JSON, with_digest(asdict(self)))


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
