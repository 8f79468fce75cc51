"""Finished work is discarded by nobody but the user: every call is judged before it runs (C8)."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import datasets
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save_file

from pipeline.config.job_queries import ORDER
from pipeline.errors import ConfigError, Interrupted, StageError
from pipeline.files import file_digest
from pipeline.layout import DATASET_JSON
from pipeline.orchestrate import artifacts
from pipeline.orchestrate.run_job import run_job
from pipeline.orchestrate.run_state import RunState
from pipeline.orchestrate.signals import StopRequest
from tests.orchestrate import finished_run
from tests.orchestrate.finished_run import FinishedRun
from tests.prepare.source_folders import images, write_tar

ALL_SKIPPED = dict.fromkeys(ORDER, "skip")


pytestmark = pytest.mark.usefixtures("restored_handlers")


@pytest.fixture
def run(tmp_path: Path) -> FinishedRun:
    return finished_run.make(tmp_path)


def contents(folder: Path) -> dict[str, str]:
    """Digests of all files but those that every call writes: lock, log, and its time."""
    return {
        str(path.relative_to(folder)): file_digest(path)
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in (".lock", "run.log", "run.jsonl", "run.json")
    }


def edit_settings(run: FinishedRun, edit: Callable[[dict[str, dict[str, object]]], None]) -> None:
    """Rewrite the settings that each stage was started with, as another version would have."""
    for stage in ORDER:
        path = run.run_dir.started_with(stage)
        edit(settings := json.loads(path.read_text()))
        settings.pop("digest", None)
        path.write_text(json.dumps(settings))


@pytest.mark.parametrize(
    "overrides",
    [
        (),
        ("model.compile=true", "model.activations=stored"),
        ("data.max_rejected=0.5",),
        ("stages.pretrain.log_every_steps=3", "stages.finetune.keep_checkpoints=9"),
        ("stages.pretrain.zero_stage=2", "cluster.prefetch_mib=64", "stages.evaluate.batch=3"),
        ("name=other",),
    ],
    ids=" ".join,
)
def test_settings_that_change_no_result_leave_every_stage_done(
    run: FinishedRun, overrides: tuple[str, ...]
) -> None:
    out = run.call(*overrides)
    assert [f"{stage}: up to date" in out for stage in ORDER] == [True] * 5


def test_a_run_of_an_earlier_version_of_the_schema_is_done(run: FinishedRun) -> None:
    def earlier(settings: dict[str, dict[str, object]]) -> None:
        del settings["cluster"]
        del settings["model"]["fraction_bits"]
        for dataset in settings["data"].values():
            assert isinstance(dataset, dict)
            del dataset["jpeg_quality"]
        training = settings["stages"]["pretrain"]
        assert isinstance(training, dict)
        del training["betas"]
        del training["augment"]["crop_ratio"]

    edit_settings(run, earlier)
    assert run.actions() == ALL_SKIPPED


def test_a_run_of_a_later_version_of_the_schema_is_done(run: FinishedRun) -> None:
    def later(settings: dict[str, dict[str, object]]) -> None:
        settings["weather"] = {"sun": 1}
        settings["model"]["tint"] = "none"
        settings["stages"]["mine"] = {"steps": 3}

    edit_settings(run, later)
    assert run.actions() == ALL_SKIPPED


def test_a_finished_training_is_not_restarted_because_a_setting_changed(run: FinishedRun) -> None:
    before = contents(run.run_dir.path)
    with pytest.raises(ConfigError) as error:
        run.call("model.drop_path=0.3")
    assert error.value.message == (
        "stages.pretrain, stages.finetune: would start from scratch, and finished work would be "
        "lost:\n"
        "    pretrain (6 of 6 steps, 0:30:00 of training)\n"
        "        model.drop_path: 0.0 -> 0.3\n"
        "    finetune (6 of 6 steps, 0:30:00 of training)\n"
        "        model.drop_path: 0.0 -> 0.3\n"
        "        input changed: the weights to start from (pretrain)\n"
        "  -> restore the settings and inputs, or give the job another name (--set name=NAME); to "
        "start from scratch and move the earlier results aside, rerun the same command with "
        "--stage pretrain --stage finetune --force"
    )
    assert error.value.exit_code == 2
    assert contents(run.run_dir.path) == before


def test_a_call_of_one_stage_names_those_that_started_from_its_weights(run: FinishedRun) -> None:
    with pytest.raises(ConfigError, match="--stage pretrain --stage finetune --force"):
        run.call("stages.pretrain.base_lr=0.5", stages=["pretrain"])


def test_a_moved_folder_is_the_same_source(run: FinishedRun, tmp_path: Path) -> None:
    (tmp_path / "flowers").rename(tmp_path / "elsewhere")
    out = run.call(f"data.root={tmp_path / 'elsewhere'}")
    assert "prepare: up to date" in out


def test_a_copied_folder_gives_the_same_dataset(run: FinishedRun, tmp_path: Path) -> None:
    # Other times of change: preparation looks at the copy, and training is not asked anything.
    shutil.copytree(tmp_path / "flowers", tmp_path / "copy", copy_function=shutil.copyfile)
    os.utime(tmp_path / "copy/train/c0.tar", (1, 1))
    actions = run.actions(f"data.root={tmp_path / 'copy'}")
    assert actions == ALL_SKIPPED | {"prepare": "restart"}


@pytest.mark.parametrize("saved", [True, False], ids=["save_to_disk", "parquet"])
def test_a_moved_hugging_face_dataset_is_the_same_source(tmp_path: Path, saved: bool) -> None:
    rows = {
        "image": [Image.new("RGB", (32, 32), (9 * i, 255 - 9 * i, i)) for i in range(24)],
        "label": [i % 2 for i in range(24)],
    }
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])}
    )
    dataset = datasets.Dataset.from_dict(rows, features=features)
    root = tmp_path / "hub"
    if saved:
        dataset.save_to_disk(str(root))
    else:
        root.mkdir()
        dataset.to_parquet(str(root / "train.parquet"))
    job = tmp_path / "small.yaml"
    job.write_text(finished_run.JOB.format(root=f"{root}, layout: huggingface"))
    run = FinishedRun(job, finished_run.RunDir(tmp_path / "runs" / "small"))
    run.run_dir.path.mkdir(parents=True)
    finished_run.finish_all(run, run.load())
    shutil.copytree(root, tmp_path / "moved")  # other times, so that preparation looks at it
    os.utime(next((tmp_path / "moved").rglob("*.*")), (1, 1))
    shutil.rmtree(root)
    actions = run.actions(f"data.root={tmp_path / 'moved'}")
    assert actions == ALL_SKIPPED | {"prepare": "restart"}


def test_weights_from_a_file_that_moved_are_the_same(run: FinishedRun, tmp_path: Path) -> None:
    weights = tmp_path / "start.safetensors"
    shutil.copy(run.run_dir.weights("pretrain"), weights)
    # The content decides: the same bytes as a stage or as a file.
    assert run.actions(f"stages.finetune.from={weights}")["finetune"] == "skip"
    save_file({"weight": np.zeros(3, np.float32)}, weights)
    with pytest.raises(ConfigError, match=r"the weights to start from \(.*start\.safetensors\)"):
        run.call(f"stages.finetune.from={weights}")
    with pytest.raises(ConfigError, match=r"the weights to start from \(none\)"):
        run.call("stages.finetune.from=")


def test_data_of_a_finished_training_is_not_replaced(run: FinishedRun, tmp_path: Path) -> None:
    write_tar(tmp_path / "flowers/train/c0.tar", images(0, 40))
    before = contents(run.run_dir.path)
    for stages in ([], ["prepare"]):
        with pytest.raises(ConfigError) as error:
            run.call(stages=stages)
        assert "6 of 6 steps" in error.value.message
        assert "input changed: the dataset images" in error.value.message
        assert "--stage prepare --stage pretrain --stage finetune --force" in error.value.remedy
    assert contents(run.run_dir.path) == before


def test_a_setting_that_would_replace_the_data_is_named(run: FinishedRun) -> None:
    with pytest.raises(ConfigError, match=r"data\.images\.short_side: \"keep\" -> 24"):
        run.call("data.short_side=24")


def test_a_second_folder_of_the_same_name_is_refused(run: FinishedRun, tmp_path: Path) -> None:
    second = finished_run.make(tmp_path / "second", count=40)
    with pytest.raises(ConfigError, match=r'data\.images\.root: ".*" -> ".*second/flowers"'):
        run.call(f"data.root={second.job.parent / 'flowers'}")


def test_an_interrupted_training_is_kept_with_its_checkpoint(run: FinishedRun) -> None:
    state = RunState(run.run_dir, "small")
    inputs = state.stage("finetune").inputs
    state.start("finetune", inputs, from_scratch=True)
    assert run.actions("stages.finetune.log_every_steps=2")["finetune"] == "resume"
    with pytest.raises(ConfigError, match=r"finetune \(6 of 6 steps"):
        run.call("stages.finetune.base_lr=0.5")
    # Without a checkpoint there is nothing to lose.
    shutil.rmtree(run.run_dir.checkpoints("finetune"))
    run.run_dir.weights("finetune").unlink()
    assert run.actions("stages.finetune.base_lr=0.5")["finetune"] == "restart"


def test_cheap_stages_run_again_without_a_question(run: FinishedRun) -> None:
    assert run.actions("stages.evaluate.image_size=64") == ALL_SKIPPED | {"evaluate": "restart"}
    assert run.actions("stages.export.from=pretrain") == ALL_SKIPPED | {"export": "restart"}


def begin_preparation_only(run: FinishedRun) -> RunState:
    """As if preparation had been interrupted when it had read one unit, before any training."""
    shutil.rmtree(run.run_dir.stage("pretrain"))
    state = RunState(run.run_dir, "small")
    for stage in ORDER:
        state.reset(stage)
        shutil.rmtree(run.run_dir.checkpoints(stage), ignore_errors=True)
        if stage != "prepare":
            run.run_dir.started_with(stage).unlink(missing_ok=True)
    work = run.run_dir.dataset("images") / "work"
    work.mkdir()
    (work / "unit-000000.json").touch()
    return state


def test_interrupted_preparation_is_kept(run: FinishedRun) -> None:
    begin_preparation_only(run)
    with pytest.raises(ConfigError, match=r"1 units of the source already read"):
        run.call("data.short_side=24")
    # What it has read is of use with these.
    for override in ("max_rejected=0.5", "min_side=8", "max_pixels=9999", "shard_rows=9"):
        decision = run.decisions(f"data.{override}")["prepare"]
        assert (decision.action, decision.differences) == ("resume", [])
    assert run.actions("data.validation_fraction=0.3")["prepare"] == "resume"
    with pytest.raises(ConfigError, match=r"short_side"):
        run.call("data.short_side=24", "data.min_side=8")


def test_a_source_may_be_corrected_after_preparation_has_refused_it(run: FinishedRun) -> None:
    state = begin_preparation_only(run)
    inputs = artifacts.inputs(run.load().job, "prepare", run.run_dir)
    state.start("prepare", inputs, from_scratch=False)
    write_tar(run.job.parent / "flowers/train/c0.tar", images(0, 15))
    with pytest.raises(ConfigError, match=r"input changed: the source of data.images"):
        run.decisions()
    state.stop("prepare", 1.0, "6 of 84 images are unusable")
    assert run.actions()["prepare"] == "restart"


def test_a_byte_of_a_small_file_is_noticed_although_size_and_time_stay(run: FinishedRun) -> None:
    for path, stage in (
        (run.run_dir.dataset("images") / DATASET_JSON, "prepare"),
        (run.run_dir.weights("pretrain"), "pretrain"),
        (run.run_dir.export / "model.json", "export"),
    ):
        content = path.read_bytes()
        status = path.stat()
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
        assert run.actions() == ALL_SKIPPED | {stage: "repair"}
        path.write_bytes(content)


def test_a_damaged_input_is_not_used_by_a_stage_that_is_called_alone(run: FinishedRun) -> None:
    (run.run_dir.dataset("images") / DATASET_JSON).write_text("{}")
    with pytest.raises(StageError, match=r"rerun the same command with --stage prepare"):
        run.call(stages=["evaluate"])
    assert run.actions()["prepare"] == "repair"


def test_shards_are_read_only_if_their_stage_is_named(run: FinishedRun) -> None:
    shard = next(run.run_dir.dataset("images").glob("train-*.parquet"))
    status = shard.stat()
    content = bytearray(shard.read_bytes())
    content[100] ^= 1
    shard.write_bytes(content)
    os.utime(shard, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert run.actions()["prepare"] == "skip"
    assert run.actions(stages=["prepare"])["prepare"] == "repair"


def test_damaged_weights_without_a_checkpoint_are_not_trained_again(run: FinishedRun) -> None:
    shutil.rmtree(run.run_dir.checkpoints("pretrain"))
    assert run.actions() == ALL_SKIPPED
    run.run_dir.weights("pretrain").write_text("damaged")
    with pytest.raises(ConfigError, match="no checkpoint is left to write it"):
        run.call()


def test_a_run_of_version_0_1_0_is_done(run: FinishedRun) -> None:
    """It recorded the digest of dataset.json where there is a fingerprint now."""
    path = run.run_dir.run_json
    record = {key: value for key, value in json.loads(path.read_text()).items() if key != "digest"}
    digest = file_digest(run.run_dir.dataset("images") / DATASET_JSON)
    for stage in ORDER[1:]:
        del record["stages"][stage]["inputs"]["dataset"]
        record["stages"][stage]["inputs"]["data"] = digest
    path.write_text(json.dumps(record))
    assert run.actions() == ALL_SKIPPED


def test_a_lost_record_of_settings_is_adopted(run: FinishedRun) -> None:
    path = run.run_dir.started_with("pretrain")
    path.write_text('{"seed": ')
    with pytest.raises(StageError) as error:
        run.call()
    assert f"`rm {path}`" in error.value.remedy
    path.unlink()
    assert "its settings were not recorded" in run.call()
    assert path.exists()


def test_a_forced_call_that_is_interrupted_resumes_without_force(
    run: FinishedRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also stages that it had not reached restart: their results are moved at its beginning."""

    def stop(_request: StopRequest) -> None:
        raise Interrupted("stopped", remedy="rerun the same command to resume")

    monkeypatch.setattr(StopRequest, "check", stop)
    with pytest.raises(Interrupted) as error:
        run_job(run.load(), run.run_dir, force=True)
    assert error.value.remedy == "rerun without --force to resume"
    assert run.actions() == dict.fromkeys(ORDER, "start")
    moved = {path.name.split("-", 2)[2] for path in run.run_dir.replaced.iterdir()}
    assert moved == set(ORDER)


def test_fine_tuning_of_weights_that_will_change_is_judged_before_they_do(run: FinishedRun) -> None:
    """Fine-tuning is done, and pretraining was forced and interrupted: judged before it resumes."""
    state = RunState(run.run_dir, "small")
    state.start("pretrain", state.stage("pretrain").inputs, from_scratch=True)
    with pytest.raises(ConfigError) as error:
        run.call()
    assert "finish with --stage pretrain, then rerun" in error.value.remedy
    assert "with --stage finetune --force" in error.value.remedy
    assert run.actions(stages=["pretrain"]) == {"pretrain": "resume"}
