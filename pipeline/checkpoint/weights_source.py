"""Names of weights files, as a job's ``from`` gives them. Needs no torch.

FILE.safetensors    FILE.pth    FILE.pth#model (that entry)    model.safetensors.index.json
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from pipeline.files import file_digest
from pipeline.layout import SHARDED_WEIGHTS, RunDir

TORCH_SUFFIXES = (".pth", ".pt", ".bin", ".tar")  # .tar: of torch.save, as in older codes
SUFFIXES = (".safetensors", f"/{SHARDED_WEIGHTS}", *TORCH_SUFFIXES)


class WeightsSource(NamedTuple):
    """A weights file, and the entry of it that a user chose ('': the best one)."""

    path: Path
    entry: str = ""

    def digest(self) -> str:
        """Digest of the weights. Raises OSError."""
        # The entry counts: another one in the same file means other weights.
        digest = file_digest(self.path)
        return f"{digest}#{self.entry}" if self.entry else digest

    def __str__(self) -> str:
        return f"{self.path}#{self.entry}" if self.entry else str(self.path)


def weights_source(source: str) -> WeightsSource:
    """Split "FILE.pth#model" into file and entry. A file whose name contains '#' wins."""
    path, _, entry = source.rpartition("#")
    if not path or Path(source).exists():
        return WeightsSource(Path(source))
    return WeightsSource(Path(path), entry)


def source_in_run(run_dir: RunDir, initial: str) -> WeightsSource:
    """The weights that ``from`` names: a file, or the result of a stage of the run."""
    if is_weights_file(initial):
        return weights_source(initial)
    return WeightsSource(run_dir.weights(initial))


def is_weights_file(source: str) -> bool:
    """True if ``source`` has the name of a weights file and not that of a stage."""
    return str(weights_source(source).path).endswith(SUFFIXES)
