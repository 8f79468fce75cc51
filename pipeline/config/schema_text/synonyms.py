"""What other tools call the keys of a job.

learning_rate      base_lr
gpus               processes
val_fraction       validation_fraction
"""

from __future__ import annotations

# Key (its last part) -> its names in PyTorch, timm, Lightning, DeepSpeed and Transformers.
NAMES_ELSEWHERE = {
    "activations": "activation_checkpointing gradient_checkpointing grad_checkpointing "
    "reversible save_memory",
    "balance": "balanced sampler class_weights",
    "base_lr": "learning_rate max_lr peak_lr initial_lr blr",
    "base_lr_batch": "lr_base_size",
    "betas": "beta beta1 beta2 adam_betas adam adamw",
    "channels": "width widths dims embed_dim hidden_size",
    "checkpoint_every_steps": "save_every save_interval save_steps checkpoint_interval",
    "classes": "num_classes class_names nb_classes labels",
    "clip_grad": "grad_clip gradient_clipping max_grad_norm clip_grad_norm gradient_clip_val",
    "columns": "cols num_columns num_subnet",
    "compile": "torch_compile torchcompile",
    "depths": "depth layers num_layers blocks",
    "device": "accelerator",
    "drop_path": "drop_path_rate droppath stochastic_depth",
    "ema_decay": "model_ema ema_rate ema_momentum",
    "epochs": "num_epochs max_epochs n_epochs num_train_epochs",
    "eps": "epsilon adam_eps",
    "eval_every_epochs": "eval_every eval_interval val_interval check_val_every_n_epoch",
    "flip": "hflip horizontal_flip flip_prob",
    "from": "init_weights initial pretrained resume finetune_from weights load_from",
    "global_batch": "batch_size train_batch_size total_batch_size",
    "image_size": "img_size input_size resolution crop_size train_size",
    "keep_checkpoints": "save_total_limit checkpoint_hist max_checkpoints save_top_k",
    "layout": "format dataset_type",
    "loader_threads": "workers num_workers dataloader_num_workers loader_workers data_workers",
    "log_every_steps": "log_interval log_every log_every_n_steps logging_steps print_freq",
    "max_rejected": "max_bad max_corrupt max_errors",
    "max_steps": "steps num_steps max_iters iterations total_steps",
    "micro_batch": "micro_batch_size batch_size_per_gpu per_device_train_batch_size accumulation "
    "grad_accum accum_iter accumulate_grad_batches gradient_accumulation_steps",
    "min_lr": "final_lr eta_min scheduler lr_scheduler schedule",
    "name": "run_name experiment output output_dir",
    "momentum": "sgd_momentum",
    "optimizer": "optim opt adam adamw sgd lamb",
    "order": "shuffle",
    "precision": "amp fp16 bf16 dtype mixed_precision",
    "prefetch_mib": "prefetch prefetch_factor",
    "processes": "gpus gpu num_gpus n_gpus ngpus devices nproc nproc_per_node world_size "
    "num_processes ranks",
    "randaugment": "randaug rand_augment auto_augment aa",
    "random_erasing": "reprob re_prob erase cutout",
    "repeated_augmentation": "aug_repeats num_aug_repeats",
    "root": "path dir folder directory data_dir data_path train_dir",
    "seed": "random_seed manual_seed random_state",
    "smoothing": "label_smoothing",
    "threads": "num_threads omp_num_threads cpus",
    "validation_fraction": "val_fraction val_split validation_split valid_fraction val_size "
    "test_size val_ratio",
    "warmup_epochs": "warmup warmup_steps warmup_ratio scheduler lr_scheduler schedule",
    "weight_decay": "wd l2 optim",
    "zero_stage": "zero zero_optimization sharding fsdp deepspeed",
}


def names_meant(word: str) -> list[str]:
    """Last parts of the keys that other tools call ``word``; [] if the word is not known."""
    word = word.lower().replace("-", "_")
    return [name for name, words in NAMES_ELSEWHERE.items() if word in words.split()]
