"""Names that keys and values of a job had in earlier releases.

A user's file with an old name is refused with the new name as the remedy: two spellings for one key
would stay forever. Files that this pipeline wrote itself (``run.yaml`` and ``stages/*/job.json`` of
an old run) are read with their names replaced, so that an interrupted run still resumes.
"""

from __future__ import annotations

# Old name -> new name. An entry counts only in sections that have a key with the new name.
RENAMED_KEYS = {
    # stages.pretrain, stages.finetune
    "lr": "base_lr",
    "lr_batch": "base_lr_batch",
    "ema": "ema_decay",
    "supervision": "intermediate_supervision",
    "repeats": "repeated_augmentation",
    "log_steps": "log_every_steps",
    "checkpoint_steps": "checkpoint_every_steps",
    "eval_epochs": "eval_every_epochs",
    "eval_resize": "preprocessing",
    # stages.<stage>.augment
    "erasing": "random_erasing",
    "cutmix_share": "mixup_switch_prob",
    # data.<name>, data.<name>.synthetic
    "generate": "synthetic",
    "dirt": "corrupt_fraction",
}

# Key -> old value -> new value.
RENAMED_VALUES: dict[str, dict[object, str]] = {
    "on_mismatch": {"redo": "retry"},
    "preprocessing": {1.143: "fast", 1.0: "whole"},  # of eval_resize
}
