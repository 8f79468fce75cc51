"""Combinations of values that cannot work (C5), and stages whose input does not exist (C7)."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.config.check import check
from pipeline.config.load import load_job
from pipeline.errors import ConfigError
from pipeline.layout import RunDir
from tests.config.jobs import JOB, edited, error_message, load_and_check, write


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["stages.pretrain.image_size=100"],
            "--set: stages.pretrain.image_size: 100 pixels is not a multiple of 32, the "
            "network's stride\n  -> take 96 or 128",
        ),
        (
            ["stages.evaluate.image_size=100"],
            "--set: stages.evaluate.image_size: 100 pixels is not a multiple of 32",
        ),
        (
            ["model.stem_stride=2", "stages.pretrain.image_size=40"],
            "--set: stages.pretrain.image_size: 40 pixels is not a multiple of 16, the "
            "network's stride\n  -> take 32 or 48",
        ),
        (
            ["model.stem_stride=1", "stages.evaluate.image_size=36"],
            "--set: stages.evaluate.image_size: 36 pixels is not a multiple of 8, the network's "
            "stride\n  -> take 32 or 40",
        ),
        (
            ["stages.pretrain.global_batch=63"],
            "--set: stages.pretrain.global_batch: 63 images cannot be shared evenly by 2 "
            "processes\n  -> take 62 or 64",
        ),
        (
            ["stages.pretrain.micro_batch=5"],
            "--set: stages.pretrain.micro_batch: a process's share of 32 images (global_batch 64 "
            "/ 2) is not a multiple of "
            "micro_batch 5"
            "\n  -> take one of 1, 2, 4, 8",
        ),
        (
            ["stages.pretrain.micro_batch=1", "stages.pretrain.augment.mixup=0.2"],
            "--set: stages.pretrain.micro_batch: mixup and cutmix pair the images of a micro "
            "batch, and 1 is odd",
        ),
        (
            ["model.columns=3"],
            "stages.pretrain.intermediate_supervision: intermediate supervision needs 4 columns, "
            "the model has 3"
            "\n  -> intermediate_supervision: false, or a model with more columns",
        ),
        (
            ["stages.pretrain.zero_stage=3", "model.compile=true"],
            "--set: model.compile: levels whose parameters ZeRO-3 gathers cannot be compiled"
            "\n  -> stages.pretrain.zero_stage: 2, or compile: false",
        ),
        (
            ["stages.pretrain.zero_stage=0", "stages.pretrain.precision=bf16"],
            "--set: stages.pretrain.zero_stage: ZeRO stage 0 with bf16",
        ),
        (
            [
                "stages.pretrain.zero_stage=1",
                "stages.pretrain.precision=bf16",
                "stages.pretrain.micro_batch=8",
            ],
            "--set: stages.pretrain.zero_stage: ZeRO stage 1 with bf16 would add up the gradients "
            "of 4 micro batches (of 8 images) in bf16"
            "\n  -> take 2; a run under way resumes",
        ),
        (
            ["stages.pretrain.optimizer=sgd", "stages.pretrain.betas=[0.8, 0.9]"],
            "--set: stages.pretrain.betas: the optimizer 'sgd' has no betas"
            "\n  -> remove it, or stages.pretrain.optimizer: adamw or lamb",
        ),
        (
            ["stages.pretrain.optimizer=lamb", "stages.pretrain.momentum=0.8"],
            "--set: stages.pretrain.momentum: the optimizer 'lamb' has no momentum"
            "\n  -> remove it, or stages.pretrain.optimizer: sgd",
        ),
        (
            ["stages.pretrain.nesterov=true"],
            "--set: stages.pretrain.nesterov: the optimizer 'adamw' has no nesterov",
        ),
        (
            [f"stages.pretrain.{key}" for key in ("optimizer=sgd", "nesterov=true", "momentum=0")],
            "--set: stages.pretrain.nesterov: Nesterov momentum without momentum"
            "\n  -> nesterov: false, or a momentum above 0",
        ),
        (
            ["stages.pretrain.optimizer=lars"],
            "stages.pretrain.optimizer: expected one of 'adamw', 'lamb'",
        ),
        (
            ["stages.pretrain.warmup_epochs=4"],
            "--set: stages.pretrain.warmup_epochs: 4 epochs of warm-up in a stage of 3"
            "\n  -> take at most 3",
        ),
        (
            ["stages.pretrain.min_lr=1"],
            "--set: stages.pretrain.min_lr: 1 is above the peak learning rate 0.005",
        ),
        (
            ["stages.pretrain.augment.crop_scale=[0.9, 0.1]"],
            "--set: stages.pretrain.augment.crop_scale: [0.9, 0.1] is not a range",
        ),
        (
            ["stages.pretrain.augment.crop_ratio=[2, 1]"],
            "--set: stages.pretrain.augment.crop_ratio: [2, 1] is not a range",
        ),
        (
            ["stages.pretrain.augment.randaugment=11"],
            "--set: stages.pretrain.augment.randaugment: magnitude 11 is above 10",
        ),
        (["data.toy.root="], "--set: data.toy.root: no source is given"),
        (
            ["data.toy.synthetic={min_size: 90, max_size: 80}"],
            "data.toy.synthetic.min_size: 90 is above max_size 80",
        ),
        (
            ["data.toy.synthetic={min_size: 20}"],
            "data.toy.synthetic.min_size: images of 20 pixels would all be quarantined (min_side "
            "32)",
        ),
        (
            ["data.toy.synthetic={}", "data.toy.layout=huggingface"],
            "--set: data.toy.layout: images cannot be generated in the layout 'huggingface'",
        ),
        (
            ["data.toy.synthetic={classes: 2000}", "data.toy.classes=imagenet1k"],
            "--set: data.toy.synthetic.classes: 2000 classes wanted, but the list imagenet1k has "
            "1000",
        ),
    ],
    ids=lambda value: value[0].partition("=")[0] if isinstance(value, list) else "",
)
def test_c5_impossible_combination_is_refused(
    tmp_path: Path, overrides: list[str], message: str
) -> None:
    assert message in error_message(tmp_path, JOB, *overrides)


def test_c5_evaluation_on_other_classes_than_the_head_has_is_refused(tmp_path: Path) -> None:
    text = edited(
        *("data:\n", "data:\n  other: {root: /other, classes: imagenet1k}\n"),
        *("pretrain:\n", "pretrain:\n    data: toy\n"),
        *("{recipe: quickstart_f", "{data: toy, recipe: quickstart_f"),
        *("evaluate: {", "evaluate: {data: other, "),
    )
    assert error_message(tmp_path, text) == (
        "job.yaml:14: stages.evaluate.data: the head of 'finetune' has the classes of toy (auto), "
        "not those of other (imagenet1k)\n  -> data: toy"
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            ("from: pretrain", "from: evaluate"),
            "job.yaml:11: stages.finetune.from: 'evaluate' produces no weights before finetune"
            "\n  -> from: pretrain",
        ),
        (
            ("from: pretrain", "from: pretrian"),
            "job.yaml:11: stages.finetune.from: 'pretrian' is neither a training stage nor a "
            "weights file"
            "\n  -> did you mean 'pretrain'?",
        ),
        (
            ("  finetune: {recipe: quickstart_finetune, from: pretrain}\n", ""),
            "job.yaml:11: stages.evaluate.from: needs the weights of 'finetune', which the job "
            "does not have"
            "\n  -> from: pretrain",
        ),
        (
            ("  prepare: {}\n", ""),
            "job.yaml:7: stages.pretrain.data: no stage prepares the dataset 'toy'"
            "\n  -> add `prepare: {}` to the stages",
        ),
        (
            ("epochs: 3", "data: tyo"),
            "job.yaml:10: stages.pretrain.data: the job has no dataset 'tyo'"
            "\n  -> did you mean 'toy'?",
        ),
        (
            ("prepare: {}", "prepare: {data: [tyo]}"),
            "job.yaml:7: stages.prepare.data: the job has no dataset 'tyo'"
            "\n  -> did you mean 'toy'?",
        ),
    ],
)
def test_c7_missing_input_of_a_stage_is_refused(
    tmp_path: Path, change: tuple[str, str], message: str
) -> None:
    assert message in error_message(tmp_path, edited(*change))


def test_c7_results_of_an_earlier_run_are_accepted_as_input(tmp_path: Path) -> None:
    text = edited(
        "  prepare: {}\n", "", "  pretrain:\n    recipe: quickstart_pretrain\n    epochs: 3\n", ""
    )
    loaded = load_job(write(tmp_path, text))
    with pytest.raises(ConfigError, match="needs the weights of 'pretrain'"):
        check(loaded.job, 2, loaded.origins, RunDir(tmp_path / "run"))
    write(tmp_path, "", "run/stages/pretrain/weights.safetensors")
    write(tmp_path, "", "run/stages/prepare/toy/dataset.json")
    check(loaded.job, 2, loaded.origins, RunDir(tmp_path / "run"))


@pytest.mark.parametrize(
    "settings",
    [
        ["optimizer=sgd", "momentum=0.8", "nesterov=true"],
        ["optimizer=lamb", "betas=[0.8, 0.9]", "eps=1e-6"],
        ["optimizer=sgd", "betas=[0.9, 0.999]"],  # the default, as in a resolved job
    ],
)
def test_settings_of_the_chosen_optimizer_are_accepted(settings: list[str], tmp_path: Path) -> None:
    overrides = [f"stages.pretrain.{setting}" for setting in settings]
    load_and_check(write(tmp_path, JOB), overrides)


def test_zero_0_with_bf16_is_refused_and_its_remedy_works(tmp_path: Path) -> None:
    refused = ["stages.pretrain.precision=bf16", "stages.pretrain.zero_stage=0"]
    remedy = error_message(tmp_path, JOB, *refused).partition("\n  -> take ")[2]
    loaded = load_and_check(
        write(tmp_path, JOB), [refused[0], f"stages.pretrain.zero_stage={int(remedy)}"]
    )
    assert loaded.job.stages.pretrain is not None
    assert loaded.job.stages.pretrain.precision == "bf16"
