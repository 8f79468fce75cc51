"""One flipped bit in a file of a run: whoever reads the file names it, or reads the same values."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.checkpoint.background import BackgroundWriter
from pipeline.checkpoint.description import WeightsDescription
from pipeline.checkpoint.manifest import Manifest, directory_of
from pipeline.checkpoint.reader import CheckpointReader
from pipeline.checkpoint.retention import Retention
from pipeline.checkpoint.weights import initial_weights
from pipeline.checkpoint.weights_file import verify_weights_file, write_weights_file
from pipeline.config import render
from pipeline.config.load import load_job
from pipeline.config.stage_settings import keep_settings, settings_of
from pipeline.data.dataset import open_dataset
from pipeline.data.shards import index_path
from pipeline.errors import PipelineError
from pipeline.export.reload import load_export
from pipeline.export.stage import export_stage
from pipeline.files import with_digest_line, write_text
from pipeline.layout import CLASSES_JSON, DATASET_JSON, SELF_TEST, RunDir
from pipeline.orchestrate.run_state import RunState, read_run_state
from tests.checkpoint.process_alone import alone
from tests.train import staging

FLIPS = 100
STEP = "checkpoints/pretrain/step-00000005"
JOB = """
name: small
model: revcol_quickstart
data: {toy: {synthetic: {}}}
stages: {prepare: {}, pretrain: {recipe: quickstart_pretrain}}
"""


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    """A run with real files of every kind, without their training."""
    run_dir = staging.prepared_run(tmp_path_factory.mktemp("run"))
    state = staging.with_weights(run_dir.path)
    write_weights_file(run_dir.weights("pretrain"), state)
    WeightsDescription(step=5, classes=["a", "b"], metrics={"top1": 0.5}).write(
        run_dir.stage("pretrain")
    )
    export_stage(staging.job(), run_dir)
    with alone():
        writer = BackgroundWriter(pin_memory=False, may_commit=lambda: True)
        owned = [(name, tuple(v.shape), 0, "master", v.reshape(-1)) for name, v in state.items()]
        target = directory_of(run_dir.checkpoints("pretrain"), 5)
        writer.start(target, owned, {"applied_steps": 5}, Retention(last=1))
        writer.wait()
    job = run_dir.path / "job.yaml"
    job.write_text(JOB)
    loaded = load_job(job)
    write_text(run_dir.run_yaml, with_digest_line(render.job_file(loaded)))
    keep_settings(run_dir, "pretrain", loaded.resolved())
    run_state = RunState(run_dir, "small")
    run_state.declare(["pretrain"])
    run_state.start("pretrain", {"dataset": "x"}, from_scratch=True)
    run_state.finish("pretrain", 1.5, {}, {"top1": 0.5})
    return run_dir


def checkpoint(run_dir: RunDir) -> Any:
    directory = run_dir.path / STEP
    manifest = Manifest.read(directory)
    manifest.verify(directory)
    reader = CheckpointReader(directory, manifest)
    return manifest, {name: reader.full("master", name).tolist() for name in reader.shapes}


def weights(run_dir: RunDir) -> Any:
    reader = initial_weights(run_dir, "pretrain")
    return {name: reader.full(name).tolist() for name in reader.shapes}


def images(run_dir: RunDir) -> Any:
    data = open_dataset(run_dir.dataset(staging.DATASET))
    split = data.split("train")
    return [(bytes(split.image(i)), split.label(i)) for i in range(len(split))]


def dataset(run_dir: RunDir) -> Any:
    data = open_dataset(run_dir.dataset(staging.DATASET))
    return asdict(data.description), data.classes, data.class_names


def export(run_dir: RunDir) -> Any:
    model = load_export(run_dir.export)
    state = {name: value.tolist() for name, value in model.network.state_dict().items()}
    return model.description, state


def run_state(run_dir: RunDir) -> Any:
    record = read_run_state(run_dir)
    return record and record.model_dump()


def shard(run_dir: RunDir) -> Path:
    return sorted(run_dir.dataset(staging.DATASET).glob("train-*.parquet"))[0]


Read = Callable[[RunDir], Any]
# A file, and what the next command that needs it does.
FILES: dict[str, tuple[Callable[[RunDir], Path], Read]] = {
    "checkpoint": (lambda run: run.path / STEP / "rank-00000.safetensors", checkpoint),
    "manifest": (lambda run: run.path / STEP / "manifest.json", checkpoint),
    "weights": (lambda run: run.weights("pretrain"), weights),
    "description of weights": (
        lambda run: run.description("pretrain"),
        lambda run: WeightsDescription.read(run.weights("pretrain")),
    ),
    "run state": (lambda run: run.run_json, run_state),
    "settings": (
        lambda run: run.started_with("pretrain"),
        lambda run: settings_of(run, "pretrain"),
    ),
    "resolved job": (
        lambda run: run.run_yaml,
        lambda run: load_job(run.run_yaml, migrate=True).resolved(),
    ),
    "shard": (shard, images),
    "index": (lambda run: index_path(shard(run)), images),
    "dataset": (lambda run: run.dataset(staging.DATASET) / DATASET_JSON, dataset),
    "classes": (lambda run: run.dataset(staging.DATASET) / CLASSES_JSON, dataset),
    "export": (lambda run: run.export / "model.safetensors", export),
    "description of the export": (lambda run: run.export / "model.json", export),
    "self-test": (
        lambda run: run.export / SELF_TEST,
        lambda run: verify_weights_file(run.export / SELF_TEST),
    ),
}


@pytest.mark.parametrize("name", FILES)
def test_no_flipped_bit_is_used_silently(name: str, run_dir: RunDir) -> None:
    of, read = FILES[name]
    path = of(run_dir)
    expected = read(run_dir)
    content = path.read_bytes()
    seed = random.SystemRandom().randrange(2**32)
    print(f"random seed {seed}")
    places = random.Random(seed)
    noticed = 0
    try:
        for _ in range(FLIPS):
            damaged = bytearray(content)
            bit = places.randrange(8 * len(content))
            if content[bit // 8 - 8 : bit // 8 + 8].find(b'"digest"') >= 0:
                continue  # a record without this key is one of an earlier version
            damaged[bit // 8] ^= 1 << (bit % 8)
            path.write_bytes(damaged)
            try:
                actual = read(run_dir)
            except PipelineError as error:
                noticed += 1
                assert path.name in error.message or path.parent.name in error.message, error
            else:
                # Letters of a key that nothing needs, or "1E3" instead of "1e3".
                assert same(actual, expected), f"bit {bit} is used silently"
    finally:
        path.write_bytes(content)
    assert noticed
    assert same(read(run_dir), expected)


def same(a: Any, b: Any) -> bool:
    return a == b or json.dumps(a, default=str) == json.dumps(b, default=str)


def test_equal_files_are_equal() -> None:
    assert same({"x": torch.tensor([1.0]).tolist()}, {"x": [1.0]})
    assert not same({"x": [1.0]}, {"x": [2.0]})
