"""The table "to add something, edit these files" of docs/architecture.md, done and used in a job.

A copy of the package gets a block kind, a key of a job, an evaluation metric, a layout and an
optimizer, each in exactly the files that its row names. One job then uses all of them.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.prepare.source_folders import class_folders

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = Path(__file__).parent

JOB = """
name: extended
model: {channels: [8, 16, 24, 32], depths: [1, 1, 1, 1], columns: 4, block: squeeze}
data: {root: IMAGES, min_side: 16, validation_fraction: 0.3}
stages:
  prepare: {}
  pretrain:
    {image_size: 32, epochs: 2, global_batch: 16, precision: fp32, base_lr: 1e-3,
     base_lr_batch: 16, warmup_epochs: 1, warmup_power: 2, log_every_steps: 1,
     optimizer: lion, betas: [0.9, 0.99]}
  evaluate: {from: pretrain}
  export: {from: pretrain}
"""

KEY = """    warmup_power: Annotated[PositiveFloat, Rules(hparam=99)] = Field(
        1.0, description="Exponent of the warm-up (1: linear)."
    )
"""
METRIC = '''def top2(logits: Tensor, labels: Tensor) -> Tensor:
    """Images whose class is among the best two."""
    return _top(logits, labels, 2)


'''


@dataclass
class Checkout:
    """A copy of the package in which files are added and edited."""

    folder: Path

    def add(self, example: str, target: str) -> None:
        shutil.copy(EXAMPLES / example, self.folder / target)

    def edit(self, file: str, old: str, new: str) -> None:
        path = self.folder / file
        text = path.read_text()
        assert text.count(old) == 1, f"{file} has changed: adapt this example"
        path.write_text(text.replace(old, new))

    def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        environment = os.environ | {"PYTHONPATH": str(self.folder), "DS_BUILD_OPS": "0"}
        return subprocess.run(
            [sys.executable, "-P", "-m", "pipeline", *arguments],
            cwd=self.folder,
            env=environment,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )

    def changed(self) -> set[str]:
        """Files of the package that are new or differ from the original."""
        return {
            str(path.relative_to(self.folder))
            for path in (self.folder / "pipeline").rglob("*.py")
            if not (original := ROOT / path.relative_to(self.folder)).exists()
            or original.read_bytes() != path.read_bytes()
        }


def copy_package(folder: Path) -> Checkout:
    ignore = shutil.ignore_patterns("__pycache__")
    for name in ("pipeline", "configs", "jobs"):
        shutil.copytree(ROOT / name, folder / name, ignore=ignore)
    return Checkout(folder)


def add_block_kind(checkout: Checkout) -> None:
    checkout.add("squeeze.py", "pipeline/blocks/kinds/squeeze.py")


def add_layout(checkout: Checkout) -> None:
    checkout.add("labelled_files.py", "pipeline/sources/layouts/labelled_files.py")


def add_optimizer(checkout: Checkout) -> None:
    checkout.add("lion.py", "pipeline/optimizers/kinds/lion.py")


def add_metric(checkout: Checkout) -> None:
    file = "pipeline/evaluate/metrics.py"
    checkout.edit(file, "def loss(", f"{METRIC}def loss(")
    checkout.edit(file, '"top5": top5,', '"top5": top5, "top2": top2,')


def add_key(checkout: Checkout) -> None:
    anchor = "    warmup_lr: NonNegativeFloat"
    checkout.edit("pipeline/config/schema/train.py", anchor, f"{KEY}{anchor}")
    file = "pipeline/train/schedule.py"
    checkout.edit(file, "    total_steps: int\n", "    total_steps: int\n    power: float\n")
    checkout.edit(
        file,
        "            total_steps=total_steps,\n",
        "            total_steps=total_steps,\n            power=config.warmup_power,\n",
    )
    checkout.edit(
        file,
        "(self.peak - self.warmup_start) * step / self.warmup_steps",
        "(self.peak - self.warmup_start) * (step / self.warmup_steps) ** self.power",
    )


ADDED = {
    "a block kind": add_block_kind,
    "a key of a job": add_key,
    "an evaluation metric": add_metric,
    "a data layout": add_layout,
    "an optimizer": add_optimizer,
}


@pytest.mark.parametrize("addition", ADDED)
def test_the_table_names_every_file_that_is_edited(addition: str, tmp_path: Path) -> None:
    checkout = copy_package(tmp_path)
    ADDED[addition](checkout)
    table = (ROOT / "docs" / "architecture.md").read_text()
    (row,) = re.findall(rf"^\| {addition} \| (.*) \|$", table, re.MULTILINE)
    named = re.findall(r"`(pipeline/[^`]+)`", row)
    for file in checkout.changed():
        is_named = any(file == path or file.startswith(path.rstrip("/")) for path in named)
        is_example = any(file.rpartition("/")[0] == path.rpartition("/")[0] for path in named)
        # The module that uses a new key depends on the key: the row says so in words.
        uses_the_key = addition == "a key of a job" and "the module that uses it" in row
        assert is_named or is_example or uses_the_key, file


@pytest.fixture(scope="module")
def extended(tmp_path_factory: pytest.TempPathFactory) -> Checkout:
    """A checkout with all additions, in which the job has run."""
    checkout = copy_package(tmp_path_factory.mktemp("extended"))
    for add in ADDED.values():
        add(checkout)
    images = checkout.folder / "images"
    source = class_folders(checkout.folder / "classes", classes=3, count=30)
    files = sorted(path for path in source.rglob("*") if path.is_file())
    (images / "images").mkdir(parents=True)
    lines = []
    for number, file in enumerate(files):
        shutil.copy(file, images / "images" / f"{number}.jpg")
        lines.append(f"{number}.jpg,{file.parent.name}\n")
    (images / "labels.csv").write_text("".join(lines))
    (checkout.folder / "job.yaml").write_text(JOB.replace("IMAGES", str(images)))
    done = checkout.run("job.yaml")
    assert done.returncode == 0, done.stdout + done.stderr
    return checkout


@pytest.mark.slow
def test_a_job_uses_all_additions(extended: Checkout) -> None:
    run = extended.folder / "runs" / "extended"
    stages = json.loads((run / "run.json").read_text())["stages"]
    metrics = stages["evaluate"]["metrics"]
    assert metrics["top1"] <= metrics["top2"]
    dataset = json.loads((run / "stages/prepare/images/dataset.json").read_text())
    assert dataset["layout"] == "labelled_files"
    assert sum(split["images"] for split in dataset["splits"].values()) > 80
    model = json.loads((run / "export" / "model.json").read_text())
    assert model["network"]["block"] == "squeeze"
    events = (run / "logs" / "pretrain.jsonl").read_text()
    assert "accuracy/top2" in events
    checkpoint = max(run.glob("checkpoints/pretrain/step-*/manifest.json"))
    assert json.loads(checkpoint.read_text())["kinds"] == ["master", "exp_avg"]


@pytest.mark.slow
def test_a_resumed_run_must_not_change_the_new_key(extended: Checkout) -> None:
    text = extended.run("explain", "warmup_power").stdout
    assert "Exponent of the warm-up" in text
    assert "lion: Sign of a mix" in extended.run("explain", "stages.pretrain.optimizer").stdout
    refused = extended.run("job.yaml", "--set", "stages.pretrain.warmup_power=fast", "--dry-run")
    assert refused.returncode == 2
    assert "expected a number above 0" in refused.stderr
    changed = extended.run("job.yaml", "--set", "stages.pretrain.warmup_power=3", "--dry-run")
    assert "warmup_power: 3.0" in changed.stdout
