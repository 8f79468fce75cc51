"""Traces of single steps by torch.profiler, for the steps that the job names."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch.profiler import ProfilerActivity, profile

from pipeline.files import write_with
from pipeline.reporting import Log
from pipeline.train.context import StageContext


@contextlib.contextmanager
def profiled(context: StageContext, step: int, log: Log) -> Iterator[None]:
    """Record the block if the job names ``step`` (from 1) in ``profile_steps``.

    The file is a Chrome trace, for chrome://tracing or ui.perfetto.dev. Every rank writes one.
    """
    if step not in context.config.profile_steps:
        yield
        return
    activities = [ProfilerActivity.CPU]
    if context.device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    with profile(activities=activities, profile_memory=True) as recorded:
        yield
        if context.device.type == "cuda":
            torch.cuda.synchronize()  # kernels that are still running belong to the step
    # A trace is for looking at: if it cannot be written, training continues.
    path = context.run_dir.profile(context.stage, step, context.dist_env.rank)
    try:
        write_with(path, lambda temporary: recorded.export_chrome_trace(str(temporary)))
    except OSError as error:
        log(f"the trace of step {step} cannot be written: {error}", "warning")
    else:
        log(f"trace of step {step} written: {path}")
