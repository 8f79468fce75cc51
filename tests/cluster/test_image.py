"""docker/Dockerfile: linted, built, and used as KubeRay and Docker use it.

The image is built for CPUs, on a stand-in for its base image; see ``image_build``.
"""

from __future__ import annotations

import importlib.metadata
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.cluster.code_package import code_digest
from tests.cluster.containers import SHORT, Container, Volume
from tests.cluster.fabric import ROOT, Fabric
from tests.cluster.image_build import BuiltImage
from tests.cluster.kuberay_commands import DASHBOARD, flags, submit_command
from tests.cluster.processes import wait_until
from tests.kubernetes.rendered import manifests

DOCKERFILE = ROOT / "docker" / "Dockerfile"
LARGEST = 2_500_000_000  # bytes, of the image for CPUs
LARGEST_CODE = 5_000_000  # bytes, of what a change of the code moves
USER = 1000
TOKEN = "0123456789abcdef" * 4


@pytest.fixture
def container(fabric: Fabric, image: BuiltImage) -> Container:
    """On a machine of its own, without volumes."""
    return Container(machine=fabric.up("n1"), image=image)


def test_the_linter_has_no_findings() -> None:
    hadolint = Path(sys.executable).with_name("hadolint")
    done = subprocess.run([hadolint, DOCKERFILE], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_a_change_of_the_code_moves_megabytes(
    image: BuiltImage, record_property: pytest.RecordProperty
) -> None:
    record_property("image", f"{sum(image.layers) / 1e6:.0f} MB")
    record_property("layers", ", ".join(f"{size / 1e6:.1f}" for size in image.layers))
    assert sum(image.layers) < LARGEST
    assert image.layers[-1] < LARGEST_CODE


def test_it_has_the_pinned_packages_and_no_tools_of_tests(container: Container) -> None:
    listed = json.loads(container.run("python", "-m", "pip", "list", "--format=json").stdout)
    versions = {entry["name"].lower().replace("_", "-"): entry["version"] for entry in listed}
    assert versions["ray"] == importlib.metadata.version("ray")
    assert {"torch", "deepspeed", "aiohttp"} <= set(versions)
    assert not {"pytest", "mypy", "ruff", "hypothesis", "moto", "s3fs"} & set(versions)


def test_it_runs_without_rights_under_a_read_only_root(container: Container) -> None:
    assert container.image.user == str(USER)  # Kubernetes cannot verify a name
    status = container.run("cat", "/proc/self/status").stdout
    assert re.search(rf"^Uid:\t{USER}\t{USER}\t{USER}\t{USER}$", status, re.MULTILINE)
    assert set(re.findall(r"^Cap\w+:\t(\w+)$", status, re.MULTILINE)) == {"0" * 16}
    assert "NoNewPrivs:\t1" in status
    for path in ("/opt/pipeline/x", "/home/pipeline/x", "/opt/venv/x"):
        assert "Read-only file system" in container.run("touch", path).stderr


def test_nothing_in_it_belongs_to_its_user_or_gives_rights(image: BuiltImage) -> None:
    """A root that is not read-only protects the code all the same."""
    below = ["find", image.root / "opt", image.root / "usr" / "local"]
    writable = [*below, "-not", "-type", "l", "(", "-uid", str(USER), "-o", "-perm", "-o+w", ")"]
    assert not subprocess.run(writable, capture_output=True, text=True, check=True).stdout


def test_the_package_is_importable_and_its_code_is_that_of_the_checkout(
    container: Container,
) -> None:
    program = "from pipeline.cluster.code_package import code_digest; print(code_digest())"
    done = container.run("python", "-c", program)
    assert done.stdout.strip() == code_digest(), done.stderr


def test_ray_starts_in_it_as_kuberay_writes_it(
    fabric: Fabric, image: BuiltImage, tmp_path: Path, shared_folder: Path
) -> None:
    """With the variables of the head's pod, and a job from its submitter."""
    job = manifests(tmp_path)["RayJob"]
    group = job["spec"]["rayClusterSpec"]["headGroupSpec"]
    template = group["template"]["spec"]["containers"][0]
    variables = {entry["name"]: entry["value"] for entry in template["env"]}
    head = Container(
        machine=fabric.up("n1"),
        image=image,
        environment=variables | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN},
    )
    options = {"block": "true", "dashboard-agent-listen-port": "52365"}
    # The machines of the tests have no route by which Ray could choose its address.
    options["node-ip-address"] = head.machine.address
    start = f"ray start --head {flags(group['rayStartParams'] | options)}"
    output = shared_folder / "ray.log"
    with open(output, "w") as file:
        ray = head.popen("/bin/bash", "-c", "--", f"ulimit -n 65536; {start}", output=file)
    question = f"import urllib.request as u; u.urlopen('{DASHBOARD}/api/gcs_healthz')"

    def answers() -> bool:
        assert ray.poll() is None, output.read_text()
        return head.run("python", "-c", question).returncode == 0

    wait_until(answers, "Ray's dashboard", 180)
    described = {"spec": {"entrypoint": "python -m pipeline --version"}}
    submitted = submit_command(described, {"jobId": "test-1"})
    done = head.run("/bin/bash", "-ce", "--", submitted, timeout=180)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Job 'test-1' succeeded" in done.stdout
    ray.terminate()
    assert ray.wait(60) is not None


def test_the_quickstart_ends_in_it(
    fabric: Fabric, image: BuiltImage, shared_folder: Path, record_property: pytest.RecordProperty
) -> None:
    """All stages: 64 MiB of shared memory, no network, a writable /tmp."""
    runs = shared_folder / "runs"
    runs.mkdir()
    runs.chmod(0o777)
    volume = Volume(folder=runs, target="/home/pipeline/runs")
    container = Container(machine=fabric.up("n1"), image=image, volumes=[volume])
    done = container.run(*image.entry_point, "jobs/quickstart.yaml", *SHORT, timeout=600)
    output = done.stdout + done.stderr
    assert done.returncode == 0, output
    assert re.search(r"^evaluate +done", output, re.MULTILINE), output
    assert "slower" not in output  # the compiled passes are there
    assert "warning" not in output.lower(), output
    exported = runs / "quickstart" / "export" / "model.safetensors"
    assert exported.stat().st_uid == USER
