"""The formats of an exported model, and the packages that each needs. Needs none of them itself."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec


@dataclass(frozen=True, kw_only=True)
class FormatFacts:
    """One format.

    ``title``: what it is, in a few words. ``packages``: what writing and checking it imports.
    ``extra``: the extra of this project that installs them.
    """

    title: str
    packages: tuple[str, ...] = ()
    extra: str = ""

    @property
    def missing(self) -> list[str]:
        """The packages that are not installed."""
        # Looked up, not imported: that takes seconds, and a job is checked before every run.
        return [name for name in self.packages if find_spec(name) is None]

    @property
    def install(self) -> str:
        """The command that installs them."""
        return f"pip install 'revcol-pipeline[{self.extra}]'"


# In the order in which they are written: the card of `hub` repeats how the others compare.
FORMATS: dict[str, FormatFacts] = {
    "native": FormatFacts(title="safetensors and model.json, for this project; always written"),
    "published": FormatFacts(title="revcol.pth, for the published code"),
    "torch_export": FormatFacts(title="torch_export/model.pt2, for torch.export.load"),
    "onnx": FormatFacts(
        title="onnx/model.onnx and others, for ONNX Runtime, OpenVINO and TensorRT",
        packages=("onnx", "onnxscript", "onnxruntime"),
        extra="onnx",
    ),
    "hub": FormatFacts(
        title="hub/, a folder for timm, transformers and the Hugging Face hub",
        packages=("timm", "transformers"),
        extra="hub",
    ),
}
