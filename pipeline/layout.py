"""The run directory: the one place that knows which file lies where.

runs/quickstart/
  run.yaml                            the resolved job
  run.json                            state, inputs, outputs and metrics of each stage
  stages/prepare/<dataset>/           shards, classes.json, dataset.json, quarantine/
  stages/<stage>/weights.safetensors  result of a training stage, described by weights.json
  stages/evaluate/evaluation.json     metrics of the reported split, and of which weights
  stages/<stage>/job.json             the resolved job with which the stage was started
  stages/<stage>/generation           number of the newest process group: the fence
  checkpoints/<stage>/step-00000500/  one file per process, and a manifest
  logs/<stage>.jsonl                  events of a stage
  logs/<stage>-rank<k>.log            output of one of its processes
  logs/run.log                        messages of the run
  tensorboard/<stage>/                event files
  export/                             the exported model
  replaced/<time>-<stage>/            earlier results of a stage that was run from scratch
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

DATASET_JSON = "dataset.json"
CLASSES_JSON = "classes.json"
WEIGHTS_FILE = "weights.safetensors"
WEIGHTS_JSON = "weights.json"
# Of an exported model:
MODEL_WEIGHTS = "model.safetensors"
MODEL_JSON = "model.json"
SELF_TEST = "selftest.safetensors"
PUBLISHED_WEIGHTS = "revcol.pth"  # only where the published code has such a network
EXPORT_FILES = (MODEL_WEIGHTS, MODEL_JSON, SELF_TEST, PUBLISHED_WEIGHTS)


@dataclass(frozen=True)
class RunDir:
    """Paths inside one run directory. Creates nothing."""

    path: Path

    @property
    def run_yaml(self) -> Path:
        return self.path / "run.yaml"

    @property
    def run_json(self) -> Path:
        return self.path / "run.json"

    @property
    def lock(self) -> Path:
        return self.path / ".lock"

    @property
    def export(self) -> Path:
        return self.path / "export"

    @property
    def logs(self) -> Path:
        return self.path / "logs"

    @property
    def run_log(self) -> Path:
        return self.logs / "run.log"

    @property
    def replaced(self) -> Path:
        return self.path / "replaced"

    def stage(self, stage: str) -> Path:
        """Results of a stage."""
        return self.path / "stages" / stage

    def dataset(self, name: str) -> Path:
        """A prepared dataset."""
        return self.stage("prepare") / name

    def weights(self, stage: str) -> Path:
        """Weights that a training stage produced."""
        return self.stage(stage) / WEIGHTS_FILE

    @property
    def evaluation(self) -> Path:
        """The result of the evaluate stage."""
        return self.stage("evaluate") / "evaluation.json"

    def started_with(self, stage: str) -> Path:
        """The resolved job (JSON) that a stage was started with."""
        return self.stage(stage) / "job.json"

    def fence(self, stage: str) -> Path:
        """Generation number of the newest process group of a stage.

        An older group may still be alive, but must not commit results.
        """
        return self.stage(stage) / "generation"

    def checkpoints(self, stage: str) -> Path:
        return self.path / "checkpoints" / stage

    def events(self, stage: str) -> Path:
        """Event log of a stage (JSON lines)."""
        return self.logs / f"{stage}.jsonl"

    def log(self, stage: str, rank: int) -> Path:
        """Standard output and standard error of one process of a stage."""
        return self.logs / f"{stage}-rank{rank}.log"

    def tensorboard(self, stage: str = "") -> Path:
        """TensorBoard files of a stage, or the folder of all stages."""
        return self.path / "tensorboard" / stage if stage else self.path / "tensorboard"


def is_run(run_dir: RunDir) -> bool:
    """True if the directory holds a run, perhaps one that has not begun its first stage."""
    return run_dir.run_json.is_file() or run_dir.run_yaml.is_file()


def runs_in(folder: Path) -> list[RunDir]:
    """The runs in a folder, in the order of their names; [] if there is no such folder."""
    folders = [RunDir(path) for path in sorted(folder.glob("*"))]
    return [run_dir for run_dir in folders if is_run(run_dir)]


def find_run(target: str | Path, folder: Path) -> RunDir | None:
    """The run that a user names: a run directory, or the name of a run in ``folder``.

    A directory wins over a name. None if neither is a run.
    """
    candidates = [RunDir(Path(target)), RunDir(folder / target)]
    return next((run_dir for run_dir in candidates if is_run(run_dir)), None)
