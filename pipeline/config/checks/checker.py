"""Collects the problems of a job, each at the place where its key was written."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from pipeline.config.schema import Job
from pipeline.config.yaml_tree.diagnostics import Problem
from pipeline.errors import ConfigError
from pipeline.layout import DATASET_JSON, RunDir


class Checker:
    """The job under check and the problems reported so far."""

    def __init__(self, job: Job, origins: Mapping[str, str], run_dir: RunDir | None) -> None:
        self.job = job
        self.origins = origins
        self.run_dir = run_dir
        self.problems: list[Problem] = []

    def report(self, key: str, cause: str, remedy: str) -> None:
        """Add a problem of the value of ``key`` (dotted)."""
        self.problems.append(Problem(self.place(key), f"{key}: {cause}", remedy))

    def report_error(self, key: str, error: ConfigError) -> None:
        self.report(key, error.cause, error.remedy)

    def place(self, key: str) -> str:
        """file:line of the key, or of the nearest section around it that was written.

        Example: stages.pretrain.augment.mixup is a default -> the line of `augment`, else of
        `pretrain`, else of `stages`.
        """
        # Derived values and defaults have no line of their own; the section around them tells the
        # user where to write the key.
        while key:
            origin = self.origins.get(key, "default")
            if origin != "default":
                return origin
            key = key.rpartition(".")[0]
        return ""

    def attempt(self, stage: str, query: Callable[[], object]) -> None:
        """Report the ConfigError of a derived value (see ``job_queries``), if it raises one."""
        try:
            query()
        except ConfigError as error:
            # Queries about one stage name the key within the stage only.
            is_full = error.place.startswith("stages.")
            key = error.place if is_full else f"stages.{stage}.{error.place}"
            self.report_error(key, error)

    def check_image_size(self, key: str, size: int) -> None:
        stride = self.job.model.stride
        if size % stride:
            low = size // stride * stride
            near = " or ".join(str(side) for side in (low, low + stride) if side)
            cause = f"{size} pixels is not a multiple of {stride}, the network's stride"
            self.report(key, cause, f"take {near}")

    def has_weights(self, stage: str) -> bool:
        """True if an earlier run produced the weights of this stage."""
        return self.run_dir is not None and self.run_dir.weights(stage).is_file()

    def has_dataset(self, name: str) -> bool:
        """True if an earlier run prepared this dataset."""
        return self.run_dir is not None and (self.run_dir.dataset(name) / DATASET_JSON).is_file()
