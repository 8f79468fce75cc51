"""The rules beside a key (resume, hyperparameters, rehearsal), and the cost of an import."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.blocks import registry
from pipeline.config.load import load_job
from pipeline.config.schema import Job, Section, TrainConfig, hparam_keys
from pipeline.config.schema.rules import Rules, keys_with_rules, may_change_on_resume
from pipeline.config.schema_text import describe
from pipeline.config.schema_text.json_schema import json_schema
from tests.config.jobs import JOB, ROOT, edited, error_message, write


def test_hyperparameters_are_shown_in_this_order() -> None:
    assert hparam_keys(TrainConfig) == [
        "recipe",
        "base_lr",
        "global_batch",
        "epochs",
        "weight_decay",
        "layer_decay",
        "ema_decay",
        "image_size",
        "precision",
        "zero_stage",
    ]


def test_no_two_hyperparameters_share_a_column() -> None:
    fields = TrainConfig.model_fields.values()
    rules = [entry for info in fields for entry in info.metadata if isinstance(entry, Rules)]
    columns = sorted(rule.hparam for rule in rules if rule.hparam)
    assert columns == list(range(1, len(columns) + 1))


def test_keys_that_a_resumed_run_may_change() -> None:
    """The whole list, so that a new exception is a deliberate change of this test."""
    may_change = {
        f"{stage}: {key.dotted}"
        for stage in ("prepare", "pretrain", "evaluate")
        for key in describe.all_keys()
        if not key.keys and key.section == {}
        if key.path[0] != "stages" or key.path[1] == stage
        if key.path[0] != "cluster"
        if may_change_on_resume(Job, key.path, stage)
    }
    assert may_change == {
        "pretrain: data.<name>.root",
        "evaluate: data.<name>.root",
        *(
            f"{stage}: model.{key}"
            for stage in ("prepare", "pretrain", "evaluate")
            for key in ("activations", "stored_columns", "compile")
        ),
        *(
            f"pretrain: stages.pretrain.{key}"
            for key in (
                "recipe",
                "micro_batch",
                "on_bad_sample",
                "zero_stage",
                "on_mismatch",
                "eval_every_epochs",
                "eval_resize",
                "log_every_steps",
                "checkpoint_every_steps",
                "keep_checkpoints",
            )
        ),
        "evaluate: stages.evaluate.batch",
    }


@pytest.mark.parametrize(
    ("key", "allowed"),
    [
        ("cluster.processes", True),
        ("cluster.key_of_an_old_release", True),
        ("model.key_of_an_old_release", False),
        ("stages.pretrain.key_of_an_old_release", False),
        ("data.toy", False),
        ("data.toy.synthetic.seed", False),
        ("seed", False),
    ],
)
def test_rules_of_a_section_hold_for_the_keys_below_it(key: str, allowed: bool) -> None:
    assert may_change_on_resume(Job, key.split("."), "pretrain") is allowed


def test_keys_with_rules_lists_the_keys_of_a_job(tmp_path: Path) -> None:
    loaded = load_job(write(tmp_path, JOB), ["data.toy.synthetic={}"])
    keys = [key for key, _ in keys_with_rules(loaded.job)]
    assert len(keys) == len(set(keys))
    # `stages` has keys for absent stages, `origins` has sections that were written.
    assert set(loaded.origins) <= set(keys) | {"data.toy"}
    assert "stages.finetune.from" in keys
    assert "data.toy.synthetic.seed" in keys


def test_rules_of_an_alias_are_found_by_the_key_of_the_job_file() -> None:
    assert not may_change_on_resume(Job, ("stages", "finetune", "from"), "finetune")
    keys = dict(keys_with_rules(TrainConfig(epochs=1, base_lr=1.0)))
    assert keys["from"].rehearse_input is not None


@pytest.mark.parametrize("schema", [json_schema(), describe.job_schema()], ids=["file", "job"])
def test_json_schema_has_no_trace_of_the_rules(schema: describe.JsonSchema) -> None:
    text = json.dumps(schema)
    for name in (*Rules.__dataclass_fields__, "Rules", "function", "lambda"):
        assert f'"{name}"' not in text
    assert " at 0x" not in text


def test_every_section_forbids_unknown_keys() -> None:
    sections = Section.__subclasses__()
    assert len(sections) > 8
    for section in sections:
        assert section.model_config["extra"] == "forbid"
        assert section.model_config["frozen"]


def test_block_kinds_come_from_the_registry() -> None:
    key = describe.find(("model", "block"))
    assert key is not None
    for name in registry.facts():
        assert f"'{name}'" in key.expectation


@pytest.mark.parametrize("written", ["convnxt", "[c2f, convnxt, convnext, convnext]"])
def test_unknown_block_kind_suggests_the_closest_one(tmp_path: Path, written: str) -> None:
    text = edited("model: revcol_quickstart", f"model: {{base: revcol_tiny, block: {written}}}")
    message = error_message(tmp_path, text)
    assert message.startswith("job.yaml:2: model.block: expected one of 'c2f', 'convnext', ")
    assert message.endswith("\n  -> did you mean 'convnext'?")


def test_importing_the_configuration_imports_no_heavy_package() -> None:
    heavy = ["torch", "ray", "deepspeed", "datasets", "pyarrow", "cv2", "tensorboard"]
    code = (
        "import sys, pipeline.config.load, pipeline.config.check, pipeline.config.render\n"
        "import pipeline.config.schema_text.json_schema\n"
        f"print([name for name in {heavy!r} if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"
