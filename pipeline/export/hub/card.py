"""The model card: what the model is, how to use it, how it was trained, and how it was checked."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import yaml

from pipeline.export.reload import Exported
from pipeline.export.verification import Verification
from pipeline.files import write_text
from pipeline.layout import HUB_CARD

SHOWN_CLASSES = 20

_TIMM = """\
import modeling_revcol  # of this folder: registers the model with timm
import timm
from PIL import Image

model = timm.create_model("local-dir:.", pretrained=True).eval()
settings = timm.data.resolve_model_data_config(model)
transform = timm.data.create_transform(**settings, is_training=False)
logits = model(transform(Image.open("IMAGE.jpg").convert("RGB"))[None])
features = timm.create_model("local-dir:.", pretrained=True, features_only=True)
"""
_TRANSFORMERS = """\
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForImageClassification

processor = AutoImageProcessor.from_pretrained(".")
model = AutoModelForImageClassification.from_pretrained(".", trust_remote_code=True)
pixels = processor(Image.open("IMAGE.jpg").convert("RGB"), return_tensors="pt")
label = model.config.id2label[int(model(**pixels).logits.argmax())]
"""
_TORCH = """\
import json

from modeling_revcol import RevColNet
from safetensors.torch import load_file

config = json.load(open("config.json"))
model = RevColNet(num_classes=config["num_classes"], **config["model_args"]).eval()
model.load_state_dict(load_file("model.safetensors"))
"""
_ONNX = """\
import json

import numpy as np
import onnxruntime
from PIL import Image

session = onnxruntime.InferenceSession("../onnx/model_uint8.onnx")
settings = json.loads(session.get_modelmeta().custom_metadata_map["preprocessing"])
size = settings["image_size"]
pixels = np.asarray(Image.open("IMAGE.jpg").convert("RGB").resize((size, size)))[None]
(logits,) = session.run(None, {"pixels": pixels})
"""


def write_card(folder: Path, model: Exported, verifications: Sequence[Verification]) -> None:
    """Write README.md. Raises OSError."""
    formats = {verification["format"] for verification in verifications}
    parts = [
        f"---\n{yaml.safe_dump(front_matter(model), sort_keys=False)}---\n",
        _description(model),
        "## Use\n" + _usage(with_onnx="onnx" in formats),
        "## Evaluation\n" + _evaluation(model),
        "## Training\n" + _training(model),
        "## Limits\n" + _limits(model),
        "## Checks\n" + _checks(verifications),
    ]
    write_text(folder / HUB_CARD, "\n".join(parts))


def front_matter(model: Exported) -> dict[str, object]:
    """What the Hugging Face hub reads: tags, and the accuracy as a model-index."""
    # No licence: that of the weights is for whoever publishes them to choose.
    matter: dict[str, object] = {
        "library_name": "timm",
        "pipeline_tag": "image-classification",
        "tags": ["timm", "transformers", "image-classification", "revcol"],
    }
    # An accuracy is claimed only if it was measured on these weights.
    evaluated = model.description.get("evaluated")
    if evaluated is None:
        return matter
    names = {"top1": "Top-1 accuracy", "top5": "Top-5 accuracy"}
    results = [
        {"type": "accuracy", "name": names[key], "value": round(float(evaluated[key]), 5)}
        for key in names
        if key in evaluated
    ]
    # The hub asks for an identifier and a name. A private dataset has only its name in the job.
    dataset = str(model.description.get("data", "images"))
    matter["model-index"] = [
        {
            "name": str(model.description.get("name", "revcol")),
            "results": [
                {
                    "task": {"type": "image-classification"},
                    "dataset": {
                        "type": dataset,
                        "name": dataset,
                        "split": str(evaluated["split"]),
                    },
                    "metrics": results,
                }
            ],
        }
    ]
    return matter


def _description(model: Exported) -> str:
    spec = model.network.spec
    classes = model.description["class_names"]
    shown = ", ".join(classes[:SHOWN_CLASSES]) + (", ..." if len(classes) > SHOWN_CLASSES else "")
    parameters = sum(parameter.numel() for parameter in model.network.parameters()) / 1e6
    return (
        f"# {model.description.get('name', 'RevCol')}\n"
        "A reversible column network (Cai et al., Reversible Column Networks, ICLR 2023): "
        f"{spec.columns} columns, channels {list(spec.channels)}, depths {list(spec.depths)}, "
        f"{parameters:,.2f} M parameters with all heads. It classifies images of "
        f"{model.preprocessing().image_size} pixels into {len(classes):,} classes: {shown}.\n"
    )


def _usage(*, with_onnx: bool) -> str:
    # The paths in the blocks are those seen from the folder itself.
    blocks = {
        "timm (it runs no code of a folder: import it yourself)": _TIMM,
        "transformers (without `trust_remote_code` too, after `import modeling_revcol`)": (
            _TRANSFORMERS
        ),
        "torch alone": _TORCH,
    }
    if with_onnx:
        blocks["ONNX Runtime (from pixels; normalisation is part of the program)"] = _ONNX
    return "\n".join(f"{title}:\n\n```python\n{code}```\n" for title, code in blocks.items())


def _evaluation(model: Exported) -> str:
    evaluated = model.description.get("evaluated")
    steps = model.description["preprocessing"]["steps"]
    if evaluated is None:
        return f"Not evaluated. Images are prepared like this: {steps}.\n"
    # Exports of earlier versions do not say it.
    prepared = (
        f", prepared as '{evaluated['preprocessing']}' at {evaluated['image_size']} pixels"
        if "preprocessing" in evaluated
        else ""
    )
    metrics = [
        f"{name} {float(evaluated[key]):.2%}"
        for key, name in (("top1", "top-1"), ("top5", "top-5"))
        if key in evaluated
    ]
    return (
        f"{', '.join(metrics)} on {evaluated['images']:,} images of the split "
        f"{evaluated['split']}{prepared}. For this model, images are prepared like this: "
        f"{steps}.\n"
    )


def _training(model: Exported) -> str:
    job = model.description.get("job")
    return f"```yaml\n{job}```\n" if job else "Not recorded.\n"


def _limits(model: Exported) -> str:
    return (
        f"It knows its {len(model.description['classes']):,} classes and no others: an image of "
        "anything else gets one of them. The accuracy holds for images like those of the "
        "evaluation.\n"
    )


def _checks(verifications: Sequence[Verification]) -> str:
    """Each format against the exported network, on random images and one CPU thread."""
    lines = [
        "| format | library | largest difference of logits | argmax equal | images/s |",
        "|---|---|---|---|---|",
    ]
    for check in verifications:
        versions = ", ".join(f"{name} {version}" for name, version in check["libraries"].items())
        lines.append(
            f"| {check['format']} | {versions} | {check['largest_difference']:.1e} | "
            f"{check['same_argmax']:.0%} | {check['images_per_s']:,.1f} |"
        )
    return "\n".join(lines) + "\n"
