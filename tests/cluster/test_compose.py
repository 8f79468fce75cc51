"""docker/compose.yaml: valid, and its services, started by hand as it says, run a job."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.cluster import debian
from tests.cluster.containers import SHORT, Container, Volume
from tests.cluster.fabric import ROOT, Fabric, FabricMachine
from tests.cluster.image_build import BuiltImage
from tests.cluster.processes import wait_until

COMPOSE = ROOT / "docker" / "compose.yaml"
UP_S = 120.0
Service = dict[str, Any]


@pytest.fixture(scope="module")
def services() -> dict[str, Service]:
    """What Docker's own program makes of the file: checked by its schema, everything filled in."""
    debian.install(["docker-compose"], ["docker-compose"])
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    command = ["docker-compose", "--file", str(COMPOSE), "config"]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env=kept | {"PATH": "/usr/bin:/bin"}
    )
    assert done.returncode == 0, done.stderr
    described: dict[str, Service] = yaml.safe_load(done.stdout)["services"]
    return described


class Started:
    """A service, in a container on a machine with its name."""

    def __init__(
        self,
        service: Service,
        machine: FabricMachine,
        image: BuiltImage,
        folders: Mapping[str, Path],
    ) -> None:
        self.service = service
        (temporary,) = service["tmpfs"]
        folder, options = temporary.split(":")
        assert folder == "/tmp"
        self.container = Container(
            machine=machine,
            image=image,
            volumes=[volume_of(text, folders) for text in service["volumes"]],
            temporary=options,
            environment=service.get("environment", {}),
        )

    def start(self, log: Path) -> None:
        entry_point = self.service.get("entrypoint", self.container.image.entry_point)
        command = [*entry_point, *self.service.get("command", [])]
        self.log = log
        with open(log, "w") as file:
            self.process = self.container.popen(
                *(word.replace("$$", "$") for word in command), output=file
            )

    def wait_for(self, *command: str) -> None:
        """Wait until a command in the container succeeds."""

        def succeeds() -> bool:
            assert self.process.poll() is None, self.log.read_text()
            return self.container.run(*command).returncode == 0

        wait_until(succeeds, " ".join(command), UP_S)


def volume_of(text: str, folders: Mapping[str, Path]) -> Volume:
    """A volume as Compose writes it: "runs:/home/pipeline/runs:rw"."""
    name, target, *mode = text.split(":")
    return Volume(folder=folders[name], target=target, read_only=mode == ["ro"])


def test_nothing_is_offered_beyond_this_machine(services: dict[str, Service]) -> None:
    assert set(services) == {"head", "worker", "tensorboard"}
    ports = [port for service in services.values() for port in service.get("ports", [])]
    assert ports == ["127.0.0.1:6006:6006/tcp"]
    for service in services.values():
        assert service["read_only"] is True
        assert service["cap_drop"] == ["ALL"]
        assert service["security_opt"] == ["no-new-privileges:true"]


def test_the_services_run_the_quickstart(
    fabric: Fabric, image: BuiltImage, services: dict[str, Service], shared_folder: Path
) -> None:
    folders = {name: shared_folder / name for name in ("runs", "token")}
    for name, folder in folders.items():
        folder.mkdir()
        # A new volume gets the owner that its folder has in the image.
        owner = (image.root / "home" / "pipeline" / name).stat()
        os.chown(folder, owner.st_uid, owner.st_gid)
    started = {
        name: Started(service, fabric.up(name), image, folders)
        for name, service in services.items()
    }
    assert services["worker"]["depends_on"] == {"head": {"condition": "service_healthy"}}
    head, worker, tensorboard = (started[name] for name in ("head", "worker", "tensorboard"))
    head.start(shared_folder / "head.log")
    head.wait_for(*head.service["healthcheck"]["test"][1:])
    for name in ("worker", "tensorboard"):
        started[name].start(shared_folder / f"{name}.log")

    # The command in the file's first lines.
    [line] = re.findall(r"exec head (.*)", COMPOSE.read_text())
    done = head.container.run(*shlex.split(line), *SHORT, timeout=900)
    output = done.stdout + done.stderr
    assert done.returncode == 0, output
    assert re.search(r"^evaluate +done", output, re.MULTILINE), output
    assert (folders["runs"] / "quickstart" / "export" / "model.safetensors").is_file()
    ranks = (folders["runs"] / "quickstart" / "logs").glob("pretrain-rank*.log")
    assert len(list(ranks)) == 2

    address = tensorboard.container.machine.address
    runs = tensorboard.container.machine.run("curl", "-s", f"http://{address}:6006/data/runs")
    assert "pretrain" in runs.stdout

    # `docker compose down`: everything ends within its time.
    for service in (worker, tensorboard, head):
        service.process.terminate()
    for service in (worker, tensorboard, head):
        assert service.process.wait(150) is not None
    assert (folders["token"] / "ray").stat().st_mode & 0o777 == 0o600
