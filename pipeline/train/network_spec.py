"""From a job to the network that a stage trains."""

from __future__ import annotations

from dataclasses import replace

from pipeline.config import job_queries
from pipeline.config.schema import Job, TrainConfig
from pipeline.evaluate.network import architecture_spec
from pipeline.model import NetworkSpec


def training_spec(job: Job, config: TrainConfig, num_classes: int) -> NetworkSpec:
    """The network of a training stage: the job's architecture, and how training computes it."""
    model = job.model
    # The architecture decides the parameters; evaluation and export build the same one. What
    # follows changes only how they are trained.
    architecture = architecture_spec(model, num_classes, supervised=config.intermediate_supervision)
    return replace(
        architecture,
        init=model.init,
        layer_scale=model.layer_scale,
        activations=model.activations,
        drop_path=job_queries.drop_path(job, config),
        head_init_scale=config.head_init_scale,
        stored_columns=model.stored_columns,
        compile=model.compile,
        fraction_bits=model.fraction_bits,
    )
