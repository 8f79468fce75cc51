"""The command predict: what it takes, what it prints, and that it never stops half-way."""

from __future__ import annotations

import csv
import io
import json
import shutil
import sys
from pathlib import Path

import pytest
import torch

from pipeline.cli import entry_point
from pipeline.errors import CheckpointError, DataError
from pipeline.export.reload import load_export
from pipeline.export.stage import export_stage
from pipeline.layout import RunDir
from pipeline.orchestrate.predict import find_export, find_images, predict
from tests.data.small_datasets import jpeg
from tests.train import staging

RUNS = Path("runs")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the run ``runs/mine``, its export, and photographs."""
    folder = tmp_path_factory.mktemp("predict")
    run_dir = staging.prepared_run(folder / "runs" / "mine")
    staging.with_weights(run_dir.path)
    export_stage(staging.job(), run_dir)
    run_dir.run_yaml.write_text("name: mine\n")
    photos = folder / "photos"
    (photos / "more").mkdir(parents=True)
    for number in range(5):
        (photos / f"{number}.jpg").write_bytes(jpeg(number, 100, 90))
    (photos / "more" / "a[1].png").write_bytes(jpeg(9, 90, 100))
    (photos / "readme.txt").write_text("no image")
    (photos / "bad.jpg").write_bytes(b"no image")
    (folder / "empty").mkdir()
    return folder


@pytest.fixture(autouse=True)
def here(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)


def main(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> object:
    """The exit code of ``pipeline predict``."""
    monkeypatch.setattr(sys, "argv", ["pipeline", "predict", *arguments])
    try:
        entry_point.main()
    except SystemExit as end:
        return end.code or 0
    return 0


@pytest.mark.parametrize(
    "target", ["mine", "runs/mine", "runs/mine/export", "runs/mine/export/model.safetensors"]
)
def test_a_run_and_its_export_are_found_by_name_folder_and_file(target: str) -> None:
    assert find_export(target, RUNS) == Path("runs/mine/export")


def test_what_is_no_model_is_named_with_the_runs_that_have_one(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"other: is neither .*\n  -> .* export: mine"):
        find_export("other", RUNS)
    RunDir(tmp_path / "young").path.mkdir()
    RunDir(tmp_path / "young").run_yaml.write_text("name: young\n")
    with pytest.raises(DataError, match="has no export yet") as error:
        find_export("young", tmp_path)
    assert f"pipeline run {tmp_path}/young/run.yaml" in error.value.remedy


def test_files_folders_and_patterns_name_images_and_each_counts_once() -> None:
    files, missing = find_images(
        ["photos/1.jpg", "photos/more", "photos/[0-2].jpg", "photos/2.jpg"]
    )
    assert [str(file) for file in files] == [
        "photos/1.jpg",
        "photos/more/a[1].png",
        "photos/0.jpg",
        "photos/2.jpg",
    ]
    assert not missing
    files, _ = find_images(["photos/more/a[1].png", "photos/**/*.png"])
    assert [file.name for file in files] == ["a[1].png"]
    files, _ = find_images(["photos"])
    assert "readme.txt" not in {file.name for file in files}
    assert len(files) == 7
    _, missing = find_images(["none.jpg", "empty"])
    assert [(entry.image, entry.error) for entry in missing] == [
        ("none.jpg", "no such file"),
        ("empty", "a folder without images"),
    ]


def test_a_bad_file_is_listed_at_the_end_with_its_reason_and_exit_code_3(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["mine", "photos/bad.jpg", "photos/0.jpg", "none.jpg", "photos/1.jpg"]
    assert main(monkeypatch, *arguments, "--top-k", "2") == 3
    captured = capsys.readouterr()
    expected = load_export("runs/mine/export").predict("photos/0.jpg", best=2)
    classes = ", ".join(f"{name} {share:.1%}" for _, name, share in expected)
    assert captured.out.splitlines()[0] == f"photos/0.jpg: {classes}"
    assert [line.partition(":")[0] for line in captured.out.splitlines()] == [
        "photos/0.jpg",
        "photos/1.jpg",
    ]
    assert "2 of 4 images could not be classified" in captured.err
    assert "photos/bad.jpg: not a readable image" in captured.err
    assert "none.jpg: no such file" in captured.err


def test_json_holds_every_image_with_its_classes_or_its_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(monkeypatch, "mine", "photos/0.jpg", "--json") == 0
    (entry,) = json.loads(capsys.readouterr().out)
    expected = load_export("runs/mine/export").predict("photos/0.jpg", best=3)
    assert [(shown["id"], shown["name"]) for shown in entry["classes"]] == [
        (class_id, name) for class_id, name, _ in expected
    ]
    assert main(monkeypatch, "mine", "photos/bad.jpg", "--json") == 3
    (entry,) = json.loads(capsys.readouterr().out)
    assert entry["image"] == "photos/bad.jpg"
    assert "not a readable image" in entry["error"]


def test_csv_has_one_row_per_image_and_class(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["mine", "photos/0.jpg", "photos/more", "--csv", "--top-k", "2"]
    assert main(monkeypatch, *arguments) == 0
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert [(row["image"], row["rank"]) for row in rows] == [
        ("photos/0.jpg", "1"),
        ("photos/0.jpg", "2"),
        ("photos/more/a[1].png", "1"),
        ("photos/more/a[1].png", "2"),
    ]
    assert float(rows[0]["probability"]) >= float(rows[1]["probability"])
    assert main(monkeypatch, "mine", "photos/0.jpg", "--csv", "--json") == 2


def test_progress_of_many_files_stays_off_standard_output(
    capsys: pytest.CaptureFixture[str],
) -> None:
    images = [f"photos/{number}.jpg" for number in range(5)]
    predict("mine", images, runs=RUNS, best=1, batch=2, form="json")
    captured = capsys.readouterr()
    assert len(json.loads(captured.out)) == 5
    assert "predict 5/5" in captured.err
    predict("mine", images, runs=RUNS, best=1, batch=16, form="json")
    assert capsys.readouterr().err == ""  # a single batch needs none


def test_a_batch_gives_the_probabilities_of_single_images() -> None:
    model = load_export("runs/mine/export")
    files, _ = find_images(["photos/[0-4].jpg"])
    together = model.classify(torch.cat([model.prepare(file) for file in files]), best=3)
    for file, classes in zip(files, together, strict=True):
        alone = model.predict(file, best=3)
        assert [entry[:2] for entry in classes] == [entry[:2] for entry in alone]
        shares = [entry[2] for entry in classes]
        assert shares == pytest.approx([entry[2] for entry in alone], abs=1e-6)


@pytest.mark.parametrize("name", ["model.safetensors", "model.json"])
def test_a_changed_byte_in_an_export_is_noticed_before_it_is_used(
    name: str, tmp_path: Path
) -> None:
    copy = tmp_path / "export"
    shutil.copytree("runs/mine/export", copy)
    load_export(copy)
    file = copy / name
    content = file.read_bytes()
    # The last digit of a number, and a byte of the last tensor.
    offset = content.index(b'"image_size": 64') + 15 if name == "model.json" else len(content) - 2
    file.write_bytes(content[:offset] + bytes([content[offset] ^ 1]) + content[offset + 1 :])
    with pytest.raises(CheckpointError, match=rf"{name}: checksum mismatch"):
        load_export(copy)
