"""Checks a job against the machine: memory of the GPUs, their driver, compilers."""

from __future__ import annotations

from pipeline.config.checks.checker import Checker
from pipeline.config.job_queries import batches
from pipeline.config.machine import Hardware
from pipeline.config.memory import GIB, MAX_ELEMENTS, usable
from pipeline.config.memory_plan import StagePlan, remedy, stage_plan
from pipeline.errors import ConfigError


def check_driver(checker: Checker, hardware: Hardware) -> None:
    """Report a GPU driver that is too old for torch: the first stage on a GPU would fail."""
    # Within one major version, newer CUDA libraries run on older drivers.
    driver, wanted = hardware.driver_cuda, hardware.torch_cuda
    if driver is None or wanted is None or driver[0] >= wanted[0]:
        return
    cause = (
        f"the GPU driver supports CUDA {driver[0]}.{driver[1]}, "
        f"and torch is built for CUDA {wanted[0]}.{wanted[1]}"
    )
    checker.report("cluster.device", cause, "update the driver, or device: cpu")


def check_compiler(checker: Checker, hardware: Hardware) -> None:
    """Report a missing compiler before it is needed, hours later."""
    model = checker.job.model
    if not hardware.missing_compiler:
        return
    if model.compile:
        cause = f"torch.compile needs {hardware.missing_compiler}, which is not installed"
        checker.report("model.compile", cause, "install it, or compile: false")
    elif hardware.device == "cuda" and model.activations == "exact":
        # Without it the stream's kernels run one operation at a time: 1.5 times the time of a step,
        # and more memory than estimated.
        cause = (
            f"reversible columns compile their kernels for the GPU, which needs "
            f"{hardware.missing_compiler}"
        )
        checker.report("model.activations", cause, "install it, or activations: stored")


def check_memory(checker: Checker, stage: str, world_size: int, device_bytes: float) -> None:
    """Report a training stage that does not fit the GPUs."""
    key = f"stages.{stage}.micro_batch"
    try:
        plan = stage_plan(checker.job, stage, world_size, device_bytes)
        batches(plan.train, world_size)
    except ConfigError:
        return  # already reported
    if not plan.sizes():
        return  # an odd share that mixup cannot pair: already reported
    # 'auto' is still there only if no size fits. The smallest one that mixup allows is two images.
    wanted = plan.train.micro_batch
    fits = plan.best() if wanted == "auto" else plan.of_size(wanted)
    if fits is None:
        checker.report(key, _cause(plan, 2 if wanted == "auto" else wanted), remedy(plan))


def _cause(plan: StagePlan, images: int) -> str:
    memory = plan.memory(plan.least_stored)
    if images * memory.elements >= MAX_ELEMENTS:
        return f"{images} images make tensors of 2^31 elements or more, beyond 32-bit indexing"
    return (
        f"{images} images need {memory.needed(images) / GIB:.1f} GiB per GPU "
        f"({memory.in_words()}), "
        f"and {usable(plan.device_bytes) / GIB:.1f} of {plan.device_bytes / GIB:.1f} GiB are usable"
    )
