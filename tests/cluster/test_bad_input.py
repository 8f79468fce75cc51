"""Mistakes that are reported before anything is submitted: exit code 2, place and remedy."""

from __future__ import annotations

import http.server
import json
import shlex
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.cli.options import load
from pipeline.cluster import code_package
from pipeline.cluster.shared_paths import Mount, mount_of, why_not_shared
from pipeline.config.load import ON_CLUSTER, load_job
from pipeline.config.render import portable_job_file
from pipeline.errors import ConfigError
from pipeline.layout import RunDir
from pipeline.orchestrate.submit import SubmitOptions, render_submission, submit_run
from tests.prepare.source_folders import class_tars

TOKEN = "0123456789abcdef" * 4
JOB = """
name: small
model: {channels: [8, 8, 8, 8], depths: [1, 1, 1, 1], columns: 1}
data: {root: ROOT, min_side: 16}
stages:
  prepare: {}
  pretrain:
    {image_size: 32, epochs: 2, global_batch: 16, precision: fp32, base_lr: 1e-3, warmup_epochs: 1,
     intermediate_supervision: false, augment: {mixup: 0, cutmix: 0}}
"""
CLUSTER = """
kind: ray
nodes: 2
devices_per_node: 2
device: cpu
runs: /shared/runs
ray: {address: ADDRESS, token_file: TOKEN}
"""
NAMES = ["a; rm -rf x", "x" * 64, "Upper Case", "Größe-大", "$(touch here)", "it's"]


class _Dashboard(http.server.BaseHTTPRequestHandler):
    """Answers as the dashboard of a Ray cluster of another version, to whoever has the token."""

    def do_GET(self) -> None:
        sent = self.headers.get("Authorization")
        code = 200 if sent == f"Bearer {TOKEN}" else 403 if sent else 401
        self.send_response(code)
        self.end_headers()
        self.wfile.write(json.dumps({"ray_version": "2.53.0"}).encode())

    def log_message(self, format: str, *arguments: object) -> None:
        pass


@pytest.fixture
def dashboard() -> Iterator[str]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Dashboard)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A current folder with a job, whose images are on no machine, and a cluster file."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "job.yaml").write_text(JOB.replace("ROOT", "/on/the/cluster"))
    write_cluster(tmp_path, "http://127.0.0.1:1")
    return tmp_path


def write_cluster(folder: Path, address: str, token: str = "") -> None:
    text = CLUSTER.replace("ADDRESS", address)
    if token:
        (folder / "token").write_text(token)
    token_file = str(folder / "token") if token else '""'
    (folder / "cluster.yaml").write_text(text.replace("TOKEN", token_file))


def refusal(*overrides: str, on: str = "cluster.yaml", name: str = "small") -> ConfigError:
    """The error of a submission that is refused, which leaves nothing behind."""
    with pytest.raises(ConfigError) as error:
        loaded = load("job.yaml", list(overrides), on=on, submits=True)
        submit_run(loaded, RunDir(Path("runs").absolute() / name), SubmitOptions())
    assert error.value.exit_code == 2
    assert not Path("runs", name).exists()
    return error.value


def test_an_unknown_cluster_is_answered_with_the_nearest_name(folder: Path) -> None:
    error = refusal(on="slrum")
    assert error.place == "--on"
    assert "there is no file configs/cluster/slrum.yaml" in error.cause
    assert error.remedy == "did you mean 'slurm'?"


def test_a_batch_that_the_processes_cannot_share_is_refused(folder: Path) -> None:
    error = refusal("cluster.nodes=3")
    assert "16 images cannot be shared evenly by 6 processes" in error.cause
    assert error.place.startswith("job.yaml:")
    assert error.remedy == "take 12 or 18"


def test_a_run_directory_of_this_machine_is_refused(folder: Path) -> None:
    error = refusal("cluster.runs=")
    assert error.place == str(folder / "runs" / "small")
    assert "every machine has a /tmp of its own" in error.cause
    assert "--run-dir DIR" in error.remedy


def test_images_of_this_machine_are_refused(folder: Path) -> None:
    class_tars(folder / "images", classes=2, count=20, validation=4)
    error = refusal(f"data.root={folder / 'images'}")
    assert "every machine has a /tmp of its own" in error.cause
    assert error.place == "--set"
    assert "a file system that all machines share" in error.remedy


def test_images_beside_the_runs_of_the_cluster_are_accepted(folder: Path) -> None:
    class_tars(folder / "images", classes=2, count=20, validation=4)
    error = refusal(f"data.root={folder / 'images'}", f"cluster.runs={folder}")
    assert error.place == "http://127.0.0.1:1"  # only now is the cluster asked


def test_images_that_only_the_cluster_sees_are_left_to_it(folder: Path) -> None:
    job = (folder / "job.yaml").read_text().replace("image_size: 32", "image_size: auto")
    (folder / "auto.yaml").write_text(job.replace("global_batch: 16", "global_batch: auto"))
    loaded = load_job(folder / "auto.yaml", on="cluster.yaml", submits=True)
    assert loaded.origins["stages.pretrain.image_size"] == ON_CLUSTER
    assert "/on/the/cluster is not on this machine" in loaded.notes[-1]
    text = portable_job_file(loaded)
    assert "image_size: auto" in text
    assert "root: /on/the/cluster" in text
    with pytest.raises(ConfigError, match="there is no folder"):
        load_job(folder / "auto.yaml", on="cluster.yaml")  # as the driver on the cluster


def test_a_token_is_asked_for_and_refused_at_once(folder: Path, dashboard: str) -> None:
    started = time.monotonic()
    write_cluster(folder, dashboard)
    error = refusal()
    assert error.place == dashboard
    assert error.cause == "refused: it asks for a token"
    assert "cluster.ray.token_file" in error.remedy
    write_cluster(folder, dashboard, token="f" * 64)
    error = refusal()
    assert "refused (403): the token in" in error.cause
    assert "f" * 64 not in error.message
    assert time.monotonic() - started < 3 * 2


def test_a_token_file_that_is_not_there_is_named(folder: Path, dashboard: str) -> None:
    write_cluster(folder, dashboard, token=TOKEN)
    (folder / "token").unlink()
    error = refusal()
    assert error.place == str(folder / "token")
    assert "cannot read the access token" in error.cause


def test_a_cluster_of_another_version_is_refused(folder: Path, dashboard: str) -> None:
    write_cluster(folder, dashboard, token=TOKEN)
    error = refusal()
    assert "the cluster runs Ray 2.53.0, this machine Ray" in error.cause
    assert "on the cluster" in error.remedy


def test_a_cluster_that_does_not_answer_is_named(folder: Path) -> None:
    error = refusal()
    assert error.place == "http://127.0.0.1:1"
    assert "does not answer" in error.cause
    assert "cluster.ray.address" in error.remedy


def test_code_that_is_too_large_names_its_largest_files(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(code_package, "LARGEST", 1 << 16)
    with pytest.raises(ConfigError, match="sent to a cluster") as error:
        code_package.write_package(folder / "package", "")
    assert "configs/classes/" in error.value.remedy


def test_the_code_of_a_package_is_all_that_a_driver_needs(folder: Path) -> None:
    code_package.write_package(folder / "package", "name: x\n")
    names = {path.name for path in (folder / "package").iterdir()}
    assert names == {"pipeline", "configs", "jobs", code_package.JOB_FILE}


@pytest.mark.parametrize("name", NAMES)
def test_a_name_stays_what_it_is(folder: Path, name: str) -> None:
    loaded = load("job.yaml", [f"name={name}"], on="cluster.yaml", submits=True)
    text = render_submission(loaded, RunDir(folder / "runs" / name), SubmitOptions())
    request, _, job = text.partition("\n---\n")
    (folder / "rendered.yaml").write_text(job)
    assert load_job(folder / "rendered.yaml", submits=True).job.name == name
    words = shlex.split(json.loads(request)["entrypoint"])
    assert words[words.index("--run-dir") + 1] == f"/shared/runs/{name}"
    assert words[:2] == ["PIPELINE_RAY_ADDRESS=$RAY_ADDRESS", "exec"]


def test_nothing_secret_is_rendered(folder: Path, dashboard: str) -> None:
    write_cluster(folder, dashboard, token=TOKEN)
    loaded = load("job.yaml", [], on="cluster.yaml", submits=True)
    text = render_submission(loaded, RunDir(folder / "runs" / "small"), SubmitOptions())
    assert TOKEN not in text
    assert str(folder / "token") in text


def test_a_secret_in_the_environment_is_refused(folder: Path) -> None:
    error = refusal("cluster.network.environment={AWS_SECRET_ACCESS_KEY: x}")
    assert "AWS_SECRET_ACCESS_KEY looks like a secret" in error.cause
    assert "a file that only you can read" in error.remedy


def test_without_sbatch_slurm_is_no_cluster(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(folder))
    error = refusal(
        "cluster.nodes=2",
        "cluster.devices_per_node=2",
        "cluster.device=cpu",
        "cluster.runs=/shared/runs",
        on="slurm",
    )
    assert "sbatch" in error.message
    assert error.remedy


@pytest.mark.parametrize(
    ("type_", "reason"), [("nfs4", ""), ("lustre", ""), ("xfs", "local file system")]
)
def test_the_type_of_a_file_system_decides(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, type_: str, reason: str
) -> None:
    mounts = tmp_path / "mountinfo"
    mounts.write_text(
        "22 1 8:1 / / rw - ext4 /dev/sda1 rw\n"
        f"40 22 0:40 / /data\\040a rw shared:1 - {type_} server:/data rw\n"
    )
    monkeypatch.setattr("pipeline.cluster.shared_paths._MOUNTS", mounts)
    assert mount_of("/data a/runs") == Mount("/data a", type_)
    assert reason in why_not_shared("/data a/runs")
    assert bool(why_not_shared("/data a/runs")) == bool(reason)
    assert not why_not_shared("/data a/runs", "/data a/runs")
