"""The result of the evaluate stage, which the exported model quotes."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields

from pipeline.files import matches_digest, with_digest, write_json
from pipeline.layout import RunDir


@dataclass(frozen=True, kw_only=True)
class EvaluationRecord:
    """The content of ``evaluation.json``.

    ``split``: validation or test. ``weights``: digest of the weights file. ``preprocessing``: how
    the images were prepared (see ``data/preprocessing.py``), at ``image_size`` pixels. ``metrics``:
    means over the images of the split.
    """

    split: str
    images: int
    weights: str
    preprocessing: str
    image_size: int
    metrics: dict[str, float]

    @classmethod
    def read(cls, run_dir: RunDir) -> EvaluationRecord | None:
        """The record of a run; None if it was not evaluated, or the record is damaged."""
        try:
            values = json.loads(run_dir.evaluation.read_text())
            if not matches_digest(values):
                return None
            return cls(**{name.name: values[name.name] for name in fields(cls)})
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            return None

    def summary(self) -> dict[str, str | int | float]:
        """All but the weights and with the metrics, for the description of a model."""
        values = asdict(self)
        del values["weights"]
        metrics = values.pop("metrics")
        return {**values, **metrics}

    def write(self, run_dir: RunDir) -> None:
        write_json(run_dir.evaluation, with_digest(asdict(self)))
