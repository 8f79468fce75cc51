"""A real Kubernetes API server on loopback: RBAC on, KubeRay's definitions, two accounts.

It has no controllers, no scheduler and no kubelet: ``kubelet_stand_in`` and ``kuberay_stand_in``
do as much of their work as runs need.
"""

from __future__ import annotations

import contextlib
import json
import secrets
import socket
import ssl
import subprocess
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from pipeline.shipped import CONFIGS
from tests.cluster.api_server_build import programs
from tests.cluster.fabric import ROOT
from tests.cluster.processes import wait_until

NAMESPACE = "training"
LAUNCHER = "launcher"  # the account of the user, with the shipped Role
CRD = ROOT.parent / "shared" / "data" / "kuberay" / "ray.io_rayjobs.yaml"
_START_S = 600.0
_ANSWER_S = 300.0
_WITH_PARENT = ("setpriv", "--pdeathsig", "KILL")
Object = dict[str, Any]


class Refused(Exception):
    """An answer of the API server that is an error."""

    def __init__(self, code: int, message: str) -> None:
        super().__init__(f"{code}: {message}")
        self.code = code
        self.message = message


@dataclass(kw_only=True)
class ApiServer:
    """A server that runs. Its methods act as its administrator."""

    folder: Path
    port: int
    tokens: dict[str, str]  # by account
    _context: ssl.SSLContext = field(default_factory=ssl._create_unverified_context)

    @property
    def url(self) -> str:
        return f"https://127.0.0.1:{self.port}"

    @property
    def kubeconfig(self) -> Path:
        """Of the user."""
        return self.folder / "kubeconfig"

    def request(
        self, method: str, path: str, body: Object | None = None, content: str = ""
    ) -> Object:
        """The JSON answer to a request. Raises Refused."""
        kind = content or "application/json"
        request = urllib.request.Request(
            self.url + path,
            method=method,
            data=None if body is None else json.dumps(body).encode(),
            headers={"Authorization": f"Bearer {self.tokens['admin']}", "Content-Type": kind},
        )
        try:
            with urllib.request.urlopen(
                request, context=self._context, timeout=_ANSWER_S
            ) as answer:
                result: Object = json.loads(answer.read() or b"{}")
                return result
        except urllib.error.HTTPError as error:
            text = error.read().decode(errors="replace")
            with contextlib.suppress(ValueError, KeyError):
                text = json.loads(text)["message"]
            raise Refused(error.code, text) from None

    def create(self, path: str, body: Object) -> Object:
        """Create an object."""
        return self.request("POST", path, body)

    def get(self, path: str) -> Object | None:
        """An object; None if there is none."""
        try:
            return self.request("GET", path)
        except Refused as refused:
            if refused.code == 404:
                return None
            raise

    def items(self, path: str, labels: str = "") -> list[Object]:
        """The objects of a list."""
        query = f"?labelSelector={urllib.parse.quote(labels)}" if labels else ""
        items: list[Object] = self.request("GET", path + query)["items"]
        return items

    def patch(self, path: str, change: Object) -> None:
        """Merge a change into an object; one that is gone is left alone."""
        with contextlib.suppress(Refused):
            self.request("PATCH", path, change, "application/merge-patch+json")

    def delete(self, path: str, grace: int | None = None) -> None:
        """Delete an object; one that is gone is left alone."""
        options = {} if grace is None else {"gracePeriodSeconds": grace}
        try:
            self.request("DELETE", path, options)
        except Refused as refused:
            if refused.code != 404:
                raise

    def grant(self, rules: Object) -> None:
        """Create a Role or a ClusterRole, and bind it to the user's account."""
        name, kind = rules["metadata"]["name"], rules["kind"]
        group = "rbac.authorization.k8s.io"
        where = f"namespaces/{NAMESPACE}/" if kind == "Role" else ""
        path = f"/apis/{group}/v1/{where}{kind.lower()}"
        self.create(f"{path}s", rules)
        binding = {
            "metadata": {"name": name},
            "roleRef": {"apiGroup": group, "kind": kind, "name": name},
            "subjects": [{"apiGroup": group, "kind": "User", "name": LAUNCHER}],
        }
        self.create(f"{path}bindings", binding)

    def define(self, definition: Object) -> None:
        """Create a CustomResourceDefinition, and wait until it is served."""
        path = "/apis/apiextensions.k8s.io/v1/customresourcedefinitions"
        name = self.create(path, definition)["metadata"]["name"]

        def is_served() -> bool:
            kept = self.get(f"{path}/{name}") or {}
            conditions = kept.get("status", {}).get("conditions") or []
            states = {entry["type"]: entry["status"] for entry in conditions}
            return states.get("Established") == "True"

        wait_until(is_served, f"the definition {name}", _START_S, poll_s=0.2)


def kuberay_definition() -> Object:
    """KubeRay's own definition of RayJobs."""
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # in C: a second instead of twenty
    definition: Object = next(iter(yaml.load_all(CRD.read_text(), Loader=loader)))
    return definition


@contextlib.contextmanager
def api_server(folder: Path) -> Iterator[ApiServer]:
    """A server with a namespace, and the user's account with the rights of the shipped Role."""
    built = programs()
    folder.mkdir(mode=0o700)
    server = ApiServer(
        folder=folder,
        port=free_port(),
        tokens={name: secrets.token_hex(16) for name in ("admin", LAUNCHER)},
    )
    _write_files(server)
    store, peers = (f"http://127.0.0.1:{free_port()}" for _ in range(2))
    etcd = [
        *(str(built.etcd), "--data-dir", str(folder / "etcd"), "--max-request-bytes", "8000000"),
        *("--listen-client-urls", store, "--advertise-client-urls", store),
        *("--listen-peer-urls", peers, "--initial-advertise-peer-urls", peers),
        *("--initial-cluster", f"default={peers}"),
        # A machine under load must not lose its only member for want of a heartbeat.
        *("--heartbeat-interval", "1000", "--election-timeout", "20000"),
        "--unsafe-no-fsync",
    ]
    serve = [
        *(str(built.api_server), "--etcd-servers", store, "--bind-address", "127.0.0.1"),
        *("--secure-port", str(server.port), "--cert-dir", str(folder / "certificates")),
        *("--token-auth-file", str(folder / "tokens.csv"), "--authorization-mode", "RBAC"),
        *("--service-cluster-ip-range", "10.96.0.0/16", "--allow-privileged=true"),
        *("--service-account-issuer", "https://kubernetes.default.svc"),
        *("--service-account-key-file", str(folder / "accounts.key")),
        *("--service-account-signing-key-file", str(folder / "accounts.key")),
        *("--request-timeout", "5m"),
        # Its accounts are made by a controller that does not run here.
        "--disable-admission-plugins=ServiceAccount",
    ]
    with _program(etcd, folder / "etcd.log"), _program(serve, folder / "server.log"):
        wait_until(lambda: _is_ready(server), "the API server", _START_S, poll_s=0.2)
        server.create("/api/v1/namespaces", {"metadata": {"name": NAMESPACE}})
        role = (CONFIGS / "kubernetes" / "launcher_role.yaml").read_text()
        server.grant(yaml.safe_load(role))
        yield server


def free_port() -> int:
    """A port of loopback that is free now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _write_files(server: ApiServer) -> None:
    tokens = server.tokens
    lines = [f"{tokens['admin']},admin,1,system:masters", f"{tokens[LAUNCHER]},{LAUNCHER},2"]
    (server.folder / "tokens.csv").write_text("\n".join(lines) + "\n")
    key = ["openssl", "genrsa", "-out", str(server.folder / "accounts.key"), "2048"]
    subprocess.run(key, check=True, capture_output=True)
    # The server signs its own certificate when it starts.
    authority = str(server.folder / "certificates" / "apiserver.crt")
    cluster = {"server": server.url, "certificate-authority": authority}
    context = {"cluster": "tests", "user": LAUNCHER, "namespace": NAMESPACE}
    config = {
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [{"name": "tests", "cluster": cluster}],
        "users": [{"name": LAUNCHER, "user": {"token": tokens[LAUNCHER]}}],
        "contexts": [{"name": "tests", "context": context}],
        "current-context": "tests",
    }
    server.kubeconfig.touch(mode=0o600)
    server.kubeconfig.write_text(yaml.safe_dump(config))


def _is_ready(server: ApiServer) -> bool:
    try:
        # It creates the roles of its own controllers after it has begun to answer.
        return (
            server.get("/apis/rbac.authorization.k8s.io/v1/clusterroles/cluster-admin") is not None
        )
    except (OSError, Refused):
        return False


@contextlib.contextmanager
def _program(command: list[str], log: Path) -> Iterator[None]:
    with open(log, "w") as output:
        process = subprocess.Popen(
            [*_WITH_PARENT, *command],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        yield
    finally:
        process.kill()
        process.wait()
