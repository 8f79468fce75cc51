"""Ray on machines of the tests, through ``pipeline node``."""

from __future__ import annotations

import json
import secrets
from dataclasses import dataclass, field
from pathlib import Path

from tests.cluster.fabric import FabricMachine, MachineProcess
from tests.cluster.processes import wait_until

START_S = 120.0
DIRECTORY = Path("/tmp/ray")  # on each machine, its own


@dataclass(kw_only=True)
class RayMachines:
    """A Ray cluster. ``folder``: seen by all machines, for the token and the logs."""

    folder: Path
    grace: int = 60
    gcs: str = ""
    dashboard: str = ""
    nodes: dict[str, MachineProcess] = field(default_factory=dict)  # by name of the machine

    @property
    def environment(self) -> dict[str, str]:
        """Variables of a client of this cluster."""
        return {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(self.token)}

    @property
    def token(self) -> Path:
        path = self.folder / "ray_token"
        if not path.exists():
            path.touch(mode=0o600)
            path.write_text(secrets.token_hex(32))
        return path

    def log(self, machine: FabricMachine) -> Path:
        return self.folder / f"node-{machine.name}.log"

    def head(self, machine: FabricMachine, *options: str) -> MachineProcess:
        """Start the head, and wait until it is up."""
        node = self._start(machine, "head", *options)
        written = DIRECTORY / "address.json"
        self._wait_for(machine, written)
        addresses = json.loads(machine.run("cat", written).stdout)
        self.gcs = addresses["gcs"]
        self.dashboard = addresses["dashboard"]
        return node

    def join(self, machine: FabricMachine, *options: str) -> MachineProcess:
        """Add a machine, and wait until it has joined."""
        node = self._start(machine, "join", self.gcs, *options)
        self._wait_for(machine, DIRECTORY / "ray_current_cluster")
        return node

    def _start(self, machine: FabricMachine, *arguments: str) -> MachineProcess:
        common = ["--directory", str(DIRECTORY), "--grace", str(self.grace)]
        with open(self.log(machine), "w") as log:
            node = machine.popen(
                "python",
                "-m",
                "pipeline",
                "node",
                *arguments,
                *common,
                environment=self.environment,
                output=log,
            )
        self.nodes[machine.name] = node
        return node

    def _wait_for(self, machine: FabricMachine, path: Path) -> None:
        """Wait for a file that is written when Ray is up on the machine."""

        def is_there() -> bool:
            log = self.log(machine).read_text()
            assert self.nodes[machine.name].poll() is None, log
            return machine.run("test", "-s", path, check=False).returncode == 0

        wait_until(is_there, f"Ray on {machine.name}", START_S, poll_s=0.2)
