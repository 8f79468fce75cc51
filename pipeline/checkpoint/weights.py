"""Weights of a training stage: their file, their description, and the check against a network."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

from pipeline.checkpoint.reader import RangeReader, WeightsReader
from pipeline.checkpoint.weights_file import verify_weights_file
from pipeline.errors import CheckpointError
from pipeline.files import matches_digest, with_digest, write_json
from pipeline.layout import WEIGHTS_JSON, RunDir

Shapes = dict[str, tuple[int, ...]]

# Keys of ``weights.json`` as earlier versions wrote them -> the field that replaced them.
_RENAMED = {"figures": "metrics"}


@dataclass(frozen=True, kw_only=True)
class WeightsDescription:
    """The content of ``weights.json``, which lies beside ``weights.safetensors``.

    A training stage fills in every field. Weights from elsewhere (published ones, a file that was
    copied alone) have no description or a partial one, so every field has a default.
    """

    network: dict[str, object] = field(default_factory=dict)  # the NetworkSpec
    weights: str = ""  # which values: "ema" or "master"
    step: int | None = None
    classes: list[str] | None = None  # class ids in index order
    image_size: int | None = None  # pixels
    resize: float | None = None  # short side before the centre crop, as a multiple of image_size
    precision: str | None = None
    data: str | None = None  # fingerprint of the training data
    metrics: dict[str, float] = field(default_factory=dict)  # at the end of the stage

    @classmethod
    def read(cls, weights: Path) -> WeightsDescription:
        """Read the description beside the file ``weights``. Without one, every field is empty.

        Raises:
            CheckpointError: the file exists but is not a description.
        """
        path = weights.with_name(WEIGHTS_JSON)
        try:
            values = json.loads(path.read_text())
            if not isinstance(values, dict):
                raise ValueError("not a JSON object")
            if not matches_digest(values):
                raise ValueError("checksum mismatch: it changed after it was written")
        except FileNotFoundError:
            return cls()
        except (OSError, ValueError) as error:
            raise CheckpointError(
                f"cannot be read ({error})",
                place=str(path),
                remedy="copy it again from the stage's folder, or remove it",
            ) from error
        for old, new in _RENAMED.items():
            if old in values:
                values.setdefault(new, values.pop(old))
        # A newer version may have added fields; they do not matter to this one.
        known = {known.name for known in fields(cls)}
        return cls(**{name: value for name, value in values.items() if name in known})

    def write(self, directory: Path) -> None:
        """Write ``weights.json`` into ``directory``."""
        write_json(directory / WEIGHTS_JSON, with_digest(asdict(self)))


def weights_path(run_dir: RunDir, initial: str) -> Path:
    """The weights file of ``initial``: a stage of this run, or the path of a .safetensors file.

    Raises:
        CheckpointError: the file does not exist.
    """
    path = Path(initial) if initial.endswith(".safetensors") else run_dir.weights(initial)
    if not path.is_file():
        raise CheckpointError(
            "weights file is missing",
            place=str(path),
            remedy=f"run the stage {initial!r} first, or name a .safetensors file",
        )
    return path


def initial_weights(run_dir: RunDir, initial: str) -> WeightsReader:
    """Open the weights that a stage starts `from`, after a comparison with their digest.

    Raises:
        CheckpointError: the file does not exist, is damaged or cannot be read.
    """
    path = weights_path(run_dir, initial)
    verify_weights_file(path)
    return WeightsReader(path)


def is_head(name: str) -> bool:
    """True for a parameter of a classifier or decoder.

    Heads belong to one stage: their numbers count supervised positions, which differ by stage.
    """
    return name.startswith(("classifiers.", "decoders."))


def backbone_names(source: RangeReader, shapes: Shapes, place: str) -> list[str]:
    """Names of the backbone's parameters in ``shapes``, all of which ``source`` can provide.

    Raises:
        CheckpointError: ``source`` lacks one of them, or has it in another shape.
    """
    names = [name for name in shapes if not is_head(name)]
    require_shapes(source, {name: shapes[name] for name in names}, place)
    return names


def require_shapes(source: RangeReader, shapes: Shapes, place: str) -> None:
    """Check that ``source`` holds every parameter in its shape.

    Raises:
        CheckpointError: names the first parameter that is missing or has another shape.
    """
    for name, shape in shapes.items():
        stored = source.shapes.get(name)
        if stored is None or tuple(stored) != shape:
            weights = "no such parameter" if stored is None else f"shape {list(stored)}"
            raise CheckpointError(
                f"parameter {name} of the model has shape {list(shape)}, "
                f"the weights have {weights}",
                place=place,
                remedy="use the model (channels, depths, columns, huge) and the classes that "
                "the weights were trained with",
            )
