"""Runs pods on machines of the tests: as much of a scheduler and a kubelet as runs need.

Each pod gets a machine of its own, with the addresses that pods have: none is shared, all reach
each other. The claims are folders that every machine sees at the paths where pods mount them. The
image is this checkout with its Python, whatever its name; "missing" in the name: none to pull.

The logs of containers are served as a kubelet serves them, so that the API server passes them on.
"""

from __future__ import annotations

import contextlib
import http.server
import signal
import ssl
import subprocess
import threading
import time
import urllib.parse
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from tests.cluster.api_server import NAMESPACE, ApiServer, Object, Refused
from tests.cluster.fabric import Fabric, FabricMachine, MachineProcess, one_core

NODE = "stand-in"
PODS = f"/api/v1/namespaces/{NAMESPACE}/pods"
_EVENTS = f"/api/v1/namespaces/{NAMESPACE}/events"
_MOST = 8  # machines at a time


def now() -> str:
    """The time as Kubernetes writes it."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def write_event(server: ApiServer, about: Object, kind: str, reason: str, message: str) -> None:
    """An event about an object, of the type "Normal" or "Warning"."""
    event = {
        "metadata": {"generateName": "event-"},
        "involvedObject": about,
        "reason": reason,
        "message": message,
        "type": kind,
        "firstTimestamp": now(),
        "lastTimestamp": now(),
    }
    with contextlib.suppress(Refused):
        server.create(_EVENTS, event)


@dataclass(kw_only=True)
class RunningPod:
    """A pod on its machine."""

    name: str
    machine: FabricMachine
    containers: dict[str, MachineProcess] = field(default_factory=dict)
    asked: float = 0.0  # when it was asked to end

    def end(self) -> None:
        """SIGTERM to the first process of each container, as its runtime does."""
        self.asked = time.monotonic()
        for name, process in self.containers.items():
            # As the first process of its container, bash ignores SIGTERM while it waits for `ray
            # job submit`. Ray's own command has replaced its shell, and heeds it.
            if name != "ray-job-submitter":
                process.send_signal(signal.SIGTERM)


class KubeletStandIn:
    """Call ``step`` again and again. What an operator knows of a pod is set by name."""

    def __init__(self, server: ApiServer, fabric: Fabric, logs: Path) -> None:
        self.server = server
        self.fabric = fabric
        self.logs = logs
        self.running: dict[str, RunningPod] = {}
        self.variables: dict[str, dict[str, str]] = {}  # by pod: what an operator injects
        # By pod: the address of the head, "" while it is not up. Pods of workers start after it.
        self.head_of: dict[str, Callable[[], str]] = {}
        self._noted: set[tuple[str, str]] = set()  # events that were written
        logs.mkdir()
        self._serve_logs()

    def step(self) -> None:
        """Compare the pods of the server with the machines, once."""
        pods = {pod["metadata"]["name"]: pod for pod in self.server.items(PODS)}
        for name in set(self.running) - set(pods):  # deleted with a grace of 0
            self._kill(name)
        for name, pod in pods.items():
            if name in self.running:
                self._watch(self.running[name], pod)
            elif "deletionTimestamp" in pod["metadata"]:
                self.server.delete(f"{PODS}/{name}", grace=0)
            elif pod["status"]["phase"] == "Pending":
                self._try_to_start(pod)

    def close(self) -> None:
        """End all machines of pods."""
        for name in list(self.running):
            self._kill(name)
        self._logs_server.shutdown()

    def _try_to_start(self, pod: Object) -> None:
        name = pod["metadata"]["name"]
        container = pod["spec"]["containers"][0]
        about = {"kind": "Pod", "name": name, "namespace": NAMESPACE}
        gpus = container["resources"]["limits"].get("nvidia.com/gpu")
        if gpus:
            message = "0/3 nodes are available: 3 Insufficient nvidia.com/gpu."
            self._note(about, "Warning", "FailedScheduling", message)
        elif "missing" in container["image"]:
            self._note(about, "Normal", "Pulling", f'Pulling image "{container["image"]}"')
            message = f'Failed to pull image "{container["image"]}": not found'
            self._note(about, "Warning", "Failed", message)
            waiting = {"reason": "ErrImagePull", "message": message}
            self._set_status(name, {"containerStatuses": [_container(container, waiting=waiting)]})
        elif len(self.running) < _MOST and (head := self.head_of.get(name, lambda: "none")()):
            self._start(pod, head)

    def _note(self, about: Object, kind: str, reason: str, message: str) -> None:
        """Write an event, once per object and reason."""
        if (about["name"], reason) not in self._noted:
            self._noted.add((about["name"], reason))
            write_event(self.server, about, kind, reason, message)

    def _start(self, pod: Object, head: str) -> None:
        name = pod["metadata"]["name"]
        free = next(f"p{i}" for i in range(1, 99) if f"p{i}" not in self.fabric.machines)
        machine = self.fabric.up(free)
        try:
            self._mount(pod, machine)
        except Refused:  # a volume that does not exist (yet): the pod stays pending
            machine.kill()
            raise
        self.running[name] = running = RunningPod(name=name, machine=machine)
        for container in pod["spec"]["containers"]:
            command = [*container.get("command", []), *container.get("args", [])]
            variables = {
                entry["name"]: entry["value"]
                for entry in container.get("env", [])
                if "value" in entry
            }
            variables |= self.variables.get(name, {})
            with open(self.logs / f"{name}.{container['name']}", "a") as log:
                running.containers[container["name"]] = machine.popen(
                    *[*_cores(container, machine), "env", "-C", "/tmp"],
                    *[
                        word.replace("$(POD_IP)", machine.address).replace("$(HEAD_IP)", head)
                        for word in command
                    ],
                    environment=variables,
                    output=log,
                )
        self._bind(name)
        self._set_status(name, self._status_of(running, pod))

    def _bind(self, name: str) -> None:
        """Assign the pod to the node whose kubelet this is."""
        target = {"kind": "Node", "name": NODE, "apiVersion": "v1"}
        with contextlib.suppress(Refused):
            self.server.create(
                f"{PODS}/{name}/binding",
                {
                    "apiVersion": "v1",
                    "kind": "Binding",
                    "metadata": {"name": name},
                    "target": target,
                },
            )

    def _mount(self, pod: Object, machine: FabricMachine) -> None:
        """The volumes of a pod, on its machine."""
        volumes = {volume["name"]: volume for volume in pod["spec"]["volumes"]}
        for mount in pod["spec"]["containers"][0]["volumeMounts"]:
            volume = volumes[mount["name"]]
            folder = mount["mountPath"]
            if "configMap" in volume:
                path = f"/api/v1/namespaces/{NAMESPACE}/configmaps/{volume['configMap']['name']}"
                files: Mapping[str, str] = self.server.request("GET", path)["data"]
                machine.run("mount", "-t", "tmpfs", "none", "/run")
                machine.run("mkdir", folder)
                for name, text in files.items():
                    machine.run("bash", "-c", 'printf %s "$1" > "$0"', f"{folder}/{name}", text)
            elif mount.get("readOnly"):
                machine.run("mount", "--bind", folder, folder)
                machine.run("mount", "-o", "remount,ro,bind", folder)

    def _watch(self, running: RunningPod, pod: Object) -> None:
        metadata = pod["metadata"]
        if "deletionTimestamp" in metadata:
            if not running.asked:
                running.end()
            grace = metadata.get("deletionGracePeriodSeconds", 30)
            others = [
                process.poll()
                for name, process in running.containers.items()
                if name != "ray-job-submitter"
            ]
            if None not in others or time.monotonic() - running.asked > grace:
                self._kill(running.name)
                self.server.delete(f"{PODS}/{running.name}", grace=0)
                return
        status = self._status_of(running, pod)
        if any(pod["status"].get(key) != value for key, value in status.items()):
            self._set_status(running.name, status)

    def _status_of(self, running: RunningPod, pod: Object) -> Object:
        codes = {name: process.poll() for name, process in running.containers.items()}
        known = {entry["name"]: entry for entry in pod["status"].get("containerStatuses", [])}
        phase = "Running"
        if None not in codes.values():
            phase = "Failed" if any(codes.values()) else "Succeeded"
        statuses = []
        for container in pod["spec"]["containers"]:
            code = codes[container["name"]]
            before = known.get(container["name"], {}).get("state", {})
            if code is None:
                state = before if "running" in before else {"running": {"startedAt": now()}}
            else:
                ended = {"exitCode": code if code >= 0 else 128 - code, "reason": "Error"}
                state = before if "terminated" in before else {"terminated": ended}
            statuses.append(_container(container, **state))
        return {"phase": phase, "podIP": running.machine.address, "containerStatuses": statuses}

    def _set_status(self, name: str, status: Object) -> None:
        self.server.patch(f"{PODS}/{name}/status", {"status": status})

    def _kill(self, name: str) -> None:
        running = self.running.pop(name)
        running.machine.kill()
        for process in running.containers.values():
            process.wait()

    def _serve_logs(self) -> None:
        """Register a node whose kubelet is this process."""
        files = {name: self.logs / name for name in ("kubelet.key", "kubelet.crt")}
        new = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2"]
        new += ["-subj", "/CN=stand-in", "-keyout", str(files["kubelet.key"])]
        new += ["-out", str(files["kubelet.crt"])]
        subprocess.run(new, check=True, capture_output=True)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(files["kubelet.crt"], files["kubelet.key"])
        logs = self.logs

        class Handler(http.server.BaseHTTPRequestHandler):
            """/containerLogs/NAMESPACE/POD/CONTAINER"""

            def do_GET(self) -> None:
                pod, container = urllib.parse.urlparse(self.path).path.split("/")[-2:]
                path = logs / f"{pod}.{container}"
                content = path.read_bytes() if path.exists() else b""
                self.send_response(200)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, format: str, *arguments: object) -> None:
                pass

        self._logs_server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._logs_server.socket = context.wrap_socket(self._logs_server.socket, server_side=True)
        threading.Thread(target=self._logs_server.serve_forever, daemon=True).start()
        self.server.create("/api/v1/nodes", {"metadata": {"name": NODE}})
        port = self._logs_server.server_address[1]
        status = {
            "addresses": [{"type": "InternalIP", "address": "127.0.0.1"}],
            "daemonEndpoints": {"kubeletEndpoint": {"Port": port}},
        }
        self.server.patch(f"/api/v1/nodes/{NODE}/status", {"status": status})


def _cores(container: Object, machine: FabricMachine) -> list[str]:
    """What to write before the command of a container that may use one core only."""
    return one_core(machine.number) if container["resources"]["limits"]["cpu"] == "1" else []


def _container(container: Object, **state: Object) -> Object:
    """The status of a container in a state: waiting, running or terminated."""
    return {
        "name": container["name"],
        "image": container["image"],
        "imageID": "",
        "ready": "running" in state,
        "restartCount": 0,
        "state": dict(state),
    }
