"""The rules beside a key (results, hyperparameters, rehearsal), and the cost of an import."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.blocks import registry
from pipeline.config.job_queries import ORDER, TRAINING
from pipeline.config.load import load_job
from pipeline.config.schema import DatasetConfig, Job, Section, TrainConfig, hparam_keys
from pipeline.config.schema.rules import (
    NOTHING,
    Rules,
    changes_result,
    keeps_work,
    keys_that_keep_work,
    keys_with_rules,
)
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
        "optimizer",
    ]


def test_no_two_hyperparameters_share_a_column() -> None:
    fields = TrainConfig.model_fields.values()
    rules = [entry for info in fields for entry in info.metadata if isinstance(entry, Rules)]
    columns = sorted(rule.hparam for rule in rules if rule.hparam)
    assert columns == list(range(1, len(columns) + 1))


# For every key: the stages whose result depends on it. A new key is a line here: decide whether a
# finished stage has to be trained again when its value changes (``Rules.changes``).
ARCHITECTURE = ("pretrain", "finetune", "evaluate", "export")
OWN_STAGE = ("own stage",)  # of a key below stages.<stage>
DECISIONS: dict[tuple[str, ...], str] = {
    NOTHING: """
        name model.activations model.stored_columns model.compile
        cluster.kind cluster.device cluster.processes cluster.threads cluster.loader_threads
        cluster.nodes cluster.devices_per_node cluster.device_gib cluster.min_nodes cluster.wait
        cluster.grace cluster.hang_timeout cluster.collective_timeout cluster.straggler_factor
        cluster.standby_after cluster.runs cluster.site_check cluster.shard_cache.local_folder
        cluster.shard_cache.max_gib cluster.ray.address cluster.ray.token_file
        cluster.network.interface cluster.network.environment.<name> cluster.slurm.partition
        cluster.slurm.account cluster.slurm.qos cluster.slurm.constraint cluster.slurm.time
        cluster.slurm.gpu_option cluster.slurm.container cluster.slurm.setup cluster.slurm.extra
        cluster.kubernetes.context cluster.kubernetes.namespace cluster.kubernetes.image
        cluster.kubernetes.pull_policy cluster.kubernetes.image_pull_secrets
        cluster.kubernetes.cpus cluster.kubernetes.memory cluster.kubernetes.gpu_resource
        cluster.kubernetes.claims.data.name cluster.kubernetes.claims.data.path
        cluster.kubernetes.claims.runs.name cluster.kubernetes.claims.runs.path
        cluster.kubernetes.environment_from cluster.kubernetes.queue
        cluster.kubernetes.priority_class cluster.kubernetes.node_selector.<name>
        cluster.kubernetes.tolerations cluster.kubernetes.labels.<name>
        cluster.kubernetes.annotations.<name>
        cluster.prefetch_mib data.<name>.root data.<name>.prepared data.<name>.max_rejected
        stages.train.data stages.train.recipe stages.train.from stages.train.micro_batch
        stages.train.on_bad_sample stages.train.zero_stage stages.train.on_mismatch
        stages.train.offload_optimizer checkpoints.mirror
        stages.train.guard.window stages.train.guard.max_skipped stages.train.guard.max_rewinds
        stages.train.guard.on_spike stages.train.guard.spike_score
        stages.train.eval_every_epochs stages.train.preprocessing stages.train.log_every_steps
        stages.train.checkpoint_every_steps stages.train.keep_checkpoints.last
        stages.train.keep_checkpoints.every_steps stages.train.keep_checkpoints.best
        stages.train.profile_steps
        stages.evaluate.data stages.evaluate.from stages.evaluate.batch stages.export.from
    """,
    ("prepare",): """
        data.<name>.layout data.<name>.classes data.<name>.validation_fraction
        data.<name>.image_column data.<name>.label_column
        data.<name>.exif_orientation data.<name>.short_side
        data.<name>.jpeg_quality data.<name>.min_side data.<name>.max_pixels data.<name>.shard_rows
        data.<name>.synthetic.classes data.<name>.synthetic.images_per_class
        data.<name>.synthetic.validation_per_class data.<name>.synthetic.min_size
        data.<name>.synthetic.max_size data.<name>.synthetic.corrupt_fraction
        data.<name>.synthetic.seed data.<name>.selection_fraction
        data.<name>.splits.train data.<name>.splits.validation data.<name>.splits.test
    """,
    ("prepare", "pretrain", "finetune"): "seed",
    ("pretrain", "finetune"): "model.drop_path model.fraction_bits model.init model.layer_scale",
    ARCHITECTURE: """
        model.channels model.depths model.columns model.huge model.block model.stem_stride
    """,
    OWN_STAGE: """
        stages.prepare.data stages.evaluate.image_size stages.evaluate.preprocessing
        stages.export.formats stages.export.hub_precision
        stages.train.keep
        stages.train.image_size stages.train.epochs stages.train.max_steps
        stages.train.global_batch stages.train.order stages.train.window_shards
        stages.train.repeated_augmentation stages.train.balance
        stages.train.intermediate_supervision stages.train.precision stages.train.base_lr
        stages.train.base_lr_batch stages.train.min_lr stages.train.warmup_epochs
        stages.train.warmup_lr stages.train.weight_decay stages.train.decay_alpha
        stages.train.optimizer stages.train.betas stages.train.eps
        stages.train.momentum stages.train.nesterov stages.train.clip_grad stages.train.layer_decay
        stages.train.drop_path stages.train.head_init_scale stages.train.ema_decay
        stages.train.augment.crop_scale stages.train.augment.crop_ratio
        stages.train.augment.crop_padding stages.train.augment.flip
        stages.train.augment.color_jitter stages.train.augment.randaugment
        stages.train.augment.randaugment_std stages.train.augment.random_erasing
        stages.train.augment.mixup stages.train.augment.cutmix
        stages.train.augment.mixup_switch_prob stages.train.augment.smoothing
    """,
}


def decided_by_the_schema() -> dict[tuple[str, ...], set[str]]:
    """Every key by the stages whose result it changes; both training stages as "train"."""
    decided: dict[tuple[str, ...], set[str]] = {}
    for key in describe.all_keys():
        # `keys` and `section` are empty for values.
        if key.keys or key.section:
            continue
        stages = tuple(stage for stage in ORDER if changes_result(Job, key.path, stage))
        name = key.dotted
        if key.path[0] == "stages":
            stages = OWN_STAGE if stages == (key.path[1],) else stages
            for training in TRAINING:
                name = name.replace(f"stages.{training}.", "stages.train.")
        decided.setdefault(stages, set()).add(name)
    return decided


def test_it_is_decided_for_every_key_which_results_it_changes() -> None:
    expected = {stages: set(keys.split()) for stages, keys in DECISIONS.items()}
    assert decided_by_the_schema() == expected


def test_it_is_decided_which_keys_leave_the_units_of_a_preparation_usable() -> None:
    """A new key of a dataset does not, until it is handled without reading the source again."""
    assert keys_that_keep_work(DatasetConfig) == [
        "validation_fraction",
        "selection_fraction",
        "min_side",
        "max_pixels",
        "shard_rows",
    ]
    assert keeps_work(Job, ("data", "toy", "min_side"))
    assert not keeps_work(Job, ("data", "toy", "short_side"))
    assert not keeps_work(Job, ("stages", "pretrain", "epochs"))


def test_the_innermost_rule_decides() -> None:
    assert changes_result(Job, ("model", "columns"), "evaluate")
    assert not changes_result(Job, ("model", "drop_path"), "evaluate")
    assert not changes_result(Job, ("model", "compile"), "pretrain")
    assert not changes_result(Job, ("cluster", "processes"), "pretrain")
    assert not changes_result(Job, ("data", "toy", "short_side"), "pretrain")
    assert changes_result(Job, ("data", "toy", "synthetic", "seed"), "prepare")


def test_keys_with_rules_lists_the_keys_of_a_job(tmp_path: Path) -> None:
    loaded = load_job(write(tmp_path, JOB), ["data.toy.synthetic={}"])
    keys = [key for key, _ in keys_with_rules(loaded.job)]
    assert len(keys) == len(set(keys))
    # `stages` has keys for absent stages, `origins` has sections that were written.
    assert set(loaded.origins) <= set(keys) | {"data.toy"}
    assert "stages.finetune.from" in keys
    assert "data.toy.synthetic.seed" in keys


def test_rules_of_an_alias_are_found_by_the_key_of_the_job_file() -> None:
    assert not changes_result(Job, ("stages", "finetune", "from"), "finetune")
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
