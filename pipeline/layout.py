"""The run directory: the one place that knows which file lies where.

runs/quickstart/
  run.yaml                            the resolved job
  run.json                            state, inputs, outputs and metrics of each stage
  cluster.json                        where the run was submitted to, if it runs on a cluster
  owner.json                          the driver that works on the run, renewed while it does
  unfit                               machines that failed the checks before the first stage
  .ray-token                          access token of the Ray of a batch job, while it runs
  requeues                            how often a batch job started again without progress
  stop                                written by the command stop: the run ends and stays ended
  stages/prepare/<dataset>/           shards, classes.json, dataset.json, quarantine/
  stages/<stage>/weights.safetensors  result of a training stage, described by weights.json
  stages/evaluate/evaluation.json     metrics of the reported split, and of which weights
  stages/<stage>/job.json             the resolved job with which the stage was started
  stages/<stage>/generation           number of the newest process group: the fence
  checkpoints/<stage>/step-00000500/  one file per process, and a manifest
  captures/<stage>/                   states before bad steps, for the command replay
  logs/<stage>.jsonl                  events of a stage
  logs/<stage>-rank<k>.log            output of one of its processes
  logs/batch.log, machines.log        output of a batch job, and of Ray on its machines
  logs/driver-<job>.log               output of the driver of a job on Kubernetes
  logs/<stage>-rank<k>.jsonl          where one of its processes runs, and where its time goes
  logs/run.log                        messages of the run
  logs/run.jsonl                      when the run was called, and what it did when
  profiles/<stage>/                   traces of torch.profiler, of the steps that the job names
  tensorboard/<stage>/                event files
  export/                             the exported model
  replaced/<time>-<stage>/            earlier results of a stage that was run from scratch
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

RUNS = Path("runs")  # folder of the run directories, in the current folder
DATASET_JSON = "dataset.json"
CLASSES_JSON = "classes.json"
SOURCE_TIMES = "source.times"  # of a prepared dataset: when its source was last changed
WEIGHTS_FILE = "weights.safetensors"
WEIGHTS_JSON = "weights.json"
# Of an exported model:
MODEL_WEIGHTS = "model.safetensors"
MODEL_JSON = "model.json"
SELF_TEST = "selftest.safetensors"
PUBLISHED_WEIGHTS = "revcol.pth"  # only where the published code has such a network
SHARDED_WEIGHTS = "model.safetensors.index.json"  # names the files that share out large weights
HUB = "hub"  # folder for timm and transformers
HUB_CONFIG = "config.json"  # its description
HUB_CODE = "modeling_revcol.py"  # its network
HUB_CARD = "README.md"
VERIFICATION = "verification.json"  # how a format compares with the exported network
ONNX_MODEL = "model.onnx"
ONNX_UINT8_MODEL = "model_uint8.onnx"  # takes pixels as they are decoded
ONNX_FEATURES = "features.onnx"
EXPORTED_PROGRAM = "model.pt2"
FORMAT_FOLDERS = ("torch_export", "onnx", HUB)  # of an exported model, named as its formats
EXPORT_FILES = (MODEL_WEIGHTS, MODEL_JSON, SELF_TEST, PUBLISHED_WEIGHTS, VERIFICATION)


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
    def cluster_json(self) -> Path:
        """Where the run was submitted to."""
        return self.path / "cluster.json"

    @property
    def owner(self) -> Path:
        """The driver that works on the run, where a lock of the file system is not enough."""
        return self.path / "owner.json"

    @property
    def submit_lock(self) -> Path:
        """Locked while a command decides whether to submit the run."""
        return self.path / ".submit.lock"

    @property
    def ray_token(self) -> Path:
        """Access token of the Ray that a batch job starts for this run, while it runs."""
        return self.path / ".ray-token"

    @property
    def requeues(self) -> Path:
        """How often a batch job was started again without progress, and its last progress."""
        return self.path / "requeues"

    @property
    def stop_mark(self) -> Path:
        """Exists from a stop request until the run is started again."""
        return self.path / "stop"

    @property
    def unfit(self) -> Path:
        """Host names of the machines that failed the last check, one per line; absent: none."""
        return self.path / "unfit"

    @property
    def written_by_all(self) -> list[Path]:
        """Folders into which the processes of every machine write."""
        return [self.path, self.path / "stages", self.path / "checkpoints", self.logs]

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
    def probe(self) -> Path:
        """Written and removed again, to see whether that is possible."""
        return self.logs / ".probe"

    @property
    def timeline(self) -> Path:
        """Calls and phases of the whole run (JSON lines); its goodput is computed from them."""
        return self.logs / "run.jsonl"

    @property
    def batch_log(self) -> Path:
        """Output of the driver in a batch job, and of the job's script."""
        return self.logs / "batch.log"

    def driver_log(self, job: str) -> Path:
        """Output of the driver of a job on Kubernetes, over all of its clusters."""
        return self.logs / f"driver-{job}.log"

    @property
    def machines_log(self) -> Path:
        """Output of the processes that keep Ray on the machines of a batch job."""
        return self.logs / "machines.log"

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

    def description(self, stage: str) -> Path:
        """What is known about these weights."""
        return self.stage(stage) / WEIGHTS_JSON

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

    def captures(self, stage: str) -> Path:
        """States before bad steps of a stage, and records of those steps, for ``replay``."""
        return self.path / "captures" / stage

    def events(self, stage: str) -> Path:
        """Event log of a stage (JSON lines)."""
        return self.logs / f"{stage}.jsonl"

    def log(self, stage: str, rank: int) -> Path:
        """Standard output and standard error of one process of a stage."""
        return self.logs / f"{stage}-rank{rank}.log"

    def times(self, stage: str, rank: int) -> Path:
        """Where the time of one process of a training stage went (JSON lines)."""
        return self.logs / f"{stage}-rank{rank}.jsonl"

    def profile(self, stage: str, step: int, rank: int) -> Path:
        """What torch.profiler recorded of one step in one process, as a Chrome trace."""
        return self.path / "profiles" / stage / f"step-{step:08d}-rank{rank}.json"

    def tensorboard(self, stage: str = "") -> Path:
        """TensorBoard files of a stage, or the folder of all stages."""
        return self.path / "tensorboard" / stage if stage else self.path / "tensorboard"


def is_run(run_dir: RunDir) -> bool:
    """True if the directory holds a run, or the record of one that only a cluster sees."""
    return has_state(run_dir) or run_dir.cluster_json.is_file()


def has_state(run_dir: RunDir) -> bool:
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
