"""The command verify: every file of a run is compared with its digest and named if it differs."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest
import torch

from pipeline.checkpoint.description import WeightsDescription
from pipeline.checkpoint.manifest import FileRecord, Manifest
from pipeline.checkpoint.weights_file import write_weights_file
from pipeline.cli import entry_point
from pipeline.config.stage_settings import keep_settings
from pipeline.files import file_digest, with_digest, write_bytes, write_json, write_text
from pipeline.layout import RunDir
from pipeline.orchestrate.run_state import Artifact, RunState
from pipeline.orchestrate.verify_run import verify_parts

STEP = "checkpoints/pretrain/step-00000005"


@pytest.fixture
def run_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunDir:
    """The finished run ``runs/mine`` with a checkpoint and an export, without prepared data."""
    monkeypatch.chdir(tmp_path)
    run_dir = RunDir(Path("runs/mine"))
    write_text(run_dir.run_yaml, "name: mine\n")
    write_weights_file(run_dir.weights("pretrain"), {"weight": torch.ones(9)})
    WeightsDescription(step=5).write(run_dir.stage("pretrain"))
    write_weights_file(run_dir.export / "model.safetensors", {"weight": torch.ones(9)})
    write_json(run_dir.export / "model.json", with_digest({"classes": ["a", "b"]}))
    rank = run_dir.path / STEP / "rank-00000.safetensors"
    write_bytes(rank, b"moments" * 9)
    record = FileRecord(bytes=rank.stat().st_size, xxh3=file_digest(rank))
    manifest = Manifest(step=5, shapes={}, kinds=[], slices=[], files={rank.name: record}, state={})
    write_json(rank.with_name("manifest.json"), manifest.to_json())
    outputs = {
        "pretrain": [run_dir.weights("pretrain"), run_dir.stage("pretrain") / "weights.json"],
        "export": sorted(run_dir.export.iterdir()),
    }
    state = RunState(run_dir, "mine")
    state.declare(list(outputs))
    for stage, files in outputs.items():
        keep_settings(run_dir, stage, {"name": "mine", "seed": 0})
        state.start(stage, {}, from_scratch=True)
        artifacts = {str(file.relative_to(run_dir.path)): Artifact.of(file) for file in files}
        state.finish(stage, 1.5, artifacts, {"top1": 0.5})
    return run_dir


def verify(monkeypatch: pytest.MonkeyPatch, target: str = "mine") -> object:
    """The exit code of ``pipeline verify``."""
    monkeypatch.setattr(sys, "argv", ["pipeline", "verify", target])
    try:
        entry_point.main()
    except SystemExit as end:
        return end.code or 0
    return 0


def damage(path: Path, offset: int) -> None:
    """Change one bit, but neither size nor time, as a damaged disk does."""
    times = path.stat()
    content = bytearray(path.read_bytes())
    content[offset] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


@pytest.mark.parametrize("target", ["mine", "runs/mine"])
def test_every_part_of_an_intact_run_is_ok(
    run_dir: RunDir,
    target: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert verify(monkeypatch, target) == 0
    assert capsys.readouterr().out.splitlines() == [
        "run state: ok",
        "results of pretrain: ok",
        "results of export: ok",
        "checkpoint step-00000005 of pretrain: ok",
    ]


@pytest.mark.parametrize(
    ("path", "remedy"),
    [
        ("stages/pretrain/weights.safetensors", "--run-dir runs/mine --stage pretrain"),
        ("stages/pretrain/weights.json", "--run-dir runs/mine --stage pretrain"),
        ("export/model.safetensors", "--run-dir runs/mine --stage export"),
        ("export/model.json", "--run-dir runs/mine --stage export"),
        ("stages/pretrain/job.json", "restore a copy, or remove it, then"),
        (f"{STEP}/rank-00000.safetensors", f"delete runs/mine/{STEP}: training resumes"),
    ],
)
def test_a_damaged_file_is_named_with_a_remedy_and_exit_code_3(
    run_dir: RunDir,
    path: str,
    remedy: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file = run_dir.path / path
    damage(file, file.stat().st_size // 2)
    assert verify(monkeypatch) == 3
    shown = capsys.readouterr().err
    assert f"1 damaged file:\n    {file}: checksum mismatch" in shown
    assert remedy in shown


def test_a_changed_figure_in_the_run_state_is_noticed(
    run_dir: RunDir, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = run_dir.run_json.read_text()
    run_dir.run_json.write_text(text.replace('"top1": 0.5', '"top1": 0.9', 1))
    assert verify(monkeypatch) == 3
    assert "run.json: is not the state of a run (checksum mismatch" in capsys.readouterr().err
    run_dir.run_json.write_text(text[:-9])
    assert verify(monkeypatch) == 3
    assert "run.json: is not the state of a run" in capsys.readouterr().err


def test_missing_files_and_an_unreadable_manifest_are_named_together(
    run_dir: RunDir, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir.weights("pretrain").unlink()
    (run_dir.export / "model.json").unlink()
    (run_dir.path / STEP / "manifest.json").write_text("{")
    assert verify(monkeypatch) == 3
    shown = capsys.readouterr().err
    assert "3 damaged files:" in shown
    assert "weights.safetensors: is missing" in shown
    assert "model.json: is missing" in shown
    assert "manifest.json: unreadable manifest" in shown


def test_a_run_of_an_older_version_has_fewer_digests_and_is_no_damage(run_dir: RunDir) -> None:
    """Neither run.json nor the settings had a digest."""
    record = json.loads(run_dir.run_json.read_text())
    del record["digest"]
    for stage in record["stages"].values():
        del stage["settings"]
    write_json(run_dir.run_json, record)
    assert [part.damages for part in verify_parts(run_dir)] == [[]] * 4
