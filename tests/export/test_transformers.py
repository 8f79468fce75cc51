"""Real transformers read the exported folder, with and without its own code."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.export.hub_models import EXPECTED, run_python

TRANSFORMERS = (
    EXPECTED
    + """
remote = sys.argv[2] == "remote"
if remote:
    sys.path.remove(str(folder))
else:
    import modeling_revcol
from PIL import Image
from transformers import (
    AutoConfig, AutoImageProcessor, AutoModelForImageClassification, Trainer, TrainingArguments,
    pipeline,
)
options = {"trust_remote_code": True} if remote else {}
config = AutoConfig.from_pretrained(folder, **options)
model = AutoModelForImageClassification.from_pretrained(folder, **options).eval()
processor = AutoImageProcessor.from_pretrained(folder, **options)
results = {"class": type(model).__name__, "labels": config.id2label}
labels = torch.tensor([1, 0, 5])
output = model(images, labels=labels)
results["logits"] = torch.equal(output.logits, logits)
cross_entropy = torch.nn.functional.cross_entropy(logits, labels)
results["loss"] = abs(float(output.loss - cross_entropy))
hidden = model(images, output_hidden_states=True).hidden_states
results["hidden"] = torch.equal(hidden[-1], expected["map3"])
pixels = processor(Image.open(image_file).convert("RGB"), return_tensors="pt").pixel_values
results["pixels"] = list(pixels.shape)
best = pipeline("image-classification", model=model, image_processor=processor)(image_file)
results["best"] = [best[0]["label"], model.config.id2label[int(model(pixels).logits.argmax())]]
saved = folder.parent / f"saved_{sys.argv[2]}"
model.save_pretrained(saved)
again = AutoModelForImageClassification.from_pretrained(saved, **options).eval()
results["saved"] = torch.equal(again(images).logits, logits)
before = model.state_dict()[next(iter(model.state_dict()))].clone()
data = [{"pixel_values": images[i % 3], "labels": int(labels[i % 3])} for i in range(8)]
arguments = TrainingArguments(
    str(folder.parent / "trainer"), max_steps=2, per_device_train_batch_size=4, report_to=[],
    save_strategy="no", use_cpu=True, disable_tqdm=True,
)
state = Trainer(model=model, args=arguments, train_dataset=data).train()
results["steps"] = state.global_step
results["learned"] = not torch.equal(before, model.state_dict()[next(iter(model.state_dict()))])
print(json.dumps(results))
"""
)


@pytest.mark.parametrize(
    ("way", "name"),
    [("remote", "RevColForImageClassification"), ("import", "TimmWrapperForImageClassification")],
)
def test_transformers_computes_the_same_logits_and_trains(
    way: str, name: str, folder: Path, tmp_path: Path
) -> None:
    results = run_python(TRANSFORMERS, folder, way, HF_HOME=str(tmp_path))
    assert results["class"] == name
    assert results["labels"] == {str(label): f"c{label}" for label in range(6)}
    assert results["logits"]
    assert results["loss"] < 1e-6
    assert results["hidden"]
    assert results["pixels"] == [1, 3, 64, 64]
    assert results["best"][0] == results["best"][1]
    assert results["saved"]
    assert results["steps"] == 2
    assert results["learned"]


UPERNET = (
    EXPECTED
    + """
import modeling_revcol
from transformers import TimmBackbone, TimmBackboneConfig, UperNetConfig
from transformers import UperNetForSemanticSegmentation
location = f"local-dir:{folder}"
backbone = TimmBackbone.from_pretrained(location, out_indices=(0, 1, 2, 3)).eval()
with torch.no_grad():
    maps = backbone(images).feature_maps
results = {"maps": all(torch.equal(m, expected[f"map{i}"]) for i, m in enumerate(maps))}
settings = TimmBackboneConfig(backbone=location, out_indices=(0, 1, 2, 3))
segmenter = UperNetForSemanticSegmentation(UperNetConfig(
    backbone_config=settings, hidden_size=16, pool_scales=[1, 2], num_labels=4,
    use_auxiliary_head=False,
))
loss = segmenter(images, labels=torch.zeros(3, 64, 96, dtype=torch.int64)).loss
loss.backward()
missing = [n for n, p in segmenter.backbone.named_parameters() if p.grad is None]
results["without_gradient"] = [n for n in missing if "classifiers" not in n]
print(json.dumps(results))
"""
)


def test_a_segmenter_of_transformers_trains_on_the_backbone(folder: Path) -> None:
    results = run_python(UPERNET, folder)
    assert results["maps"]
    assert results["without_gradient"] == []
