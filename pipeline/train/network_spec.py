"""From a job to the shape of the network that a stage trains."""

from __future__ import annotations

from pipeline.config.schema import Job, TrainConfig
from pipeline.model import NetworkSpec


def network_spec(job: Job, config: TrainConfig, num_classes: int) -> NetworkSpec:
    """The network of a training stage."""
    model = job.model
    return NetworkSpec(
        channels=model.channels,
        depths=model.depths,
        columns=model.columns,
        num_classes=num_classes,
        huge=model.huge,
        supervised=config.intermediate_supervision,
        block=model.block,
        activations=model.activations,
        drop_path=model.drop_path if config.drop_path is None else config.drop_path,
        head_init_scale=config.head_init_scale,
        stored_columns=model.stored_columns,
        compile=model.compile,
        fraction_bits=model.fraction_bits,
    )
