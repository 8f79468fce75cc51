"""The job file's schema: every key with its meaning, unit, default and rules.

This package is the only definition of what a job may contain; its classes are one schema split by
section, hence the one import path.
"""

from pipeline.config.schema.cluster import ClusterConfig, ShardCacheConfig
from pipeline.config.schema.data import DatasetConfig, SplitsConfig, SyntheticConfig
from pipeline.config.schema.job import EvaluateStage, ExportStage, Job, PrepareStage, Stages
from pipeline.config.schema.model import ModelConfig
from pipeline.config.schema.rules import hparam_keys
from pipeline.config.schema.section import Section
from pipeline.config.schema.train import AugmentConfig, GuardConfig, TrainConfig

__all__ = [
    "AugmentConfig",
    "ClusterConfig",
    "DatasetConfig",
    "EvaluateStage",
    "ExportStage",
    "GuardConfig",
    "Job",
    "ModelConfig",
    "PrepareStage",
    "Section",
    "ShardCacheConfig",
    "SplitsConfig",
    "Stages",
    "SyntheticConfig",
    "TrainConfig",
    "hparam_keys",
]
