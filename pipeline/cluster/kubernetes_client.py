"""Requests to a Kubernetes API server: the only module that imports the package kubernetes.

Objects are plain mappings, as in a manifest. Errors of the server become errors of ours: what it
refused, and which right is missing.
"""

from __future__ import annotations

import http.client
import importlib.util
import json
import os
import urllib.parse
from collections.abc import Mapping
from typing import Any

from pipeline.cluster.kubernetes_pods import Manifest
from pipeline.errors import ConfigError

_INSTALL = (
    'run "./launch.sh install kubernetes" in a checkout, else '
    'pip install "revcol-pipeline[kubernetes]"'
)
_CONNECT_S = 5.0
_ANSWER_S = 30.0
# Path of the resources of each kind, below the namespace. Written here and not discovered: that
# would cost a request per group and command.
_PATHS = {
    "ConfigMap": "/api/v1/{}/configmaps",
    "Event": "/api/v1/{}/events",
    "LocalQueue": "/apis/kueue.x-k8s.io/v1beta1/{}/localqueues",
    "NetworkPolicy": "/apis/networking.k8s.io/v1/{}/networkpolicies",
    "PersistentVolumeClaim": "/api/v1/{}/persistentvolumeclaims",
    "Pod": "/api/v1/{}/pods",
    "RayJob": "/apis/ray.io/v1/{}/rayjobs",
    "Workload": "/apis/kueue.x-k8s.io/v1beta1/{}/workloads",
}
_OF_CLUSTER = {"PriorityClass": "/apis/scheduling.k8s.io/v1/priorityclasses"}


class ApiAnswer(Exception):
    """A refusal of the API server. ``code``: of HTTP; ``cause``: in its own words."""

    def __init__(self, code: int, cause: str) -> None:
        super().__init__(cause)
        self.code = code
        self.cause = cause

    @property
    def is_missing(self) -> bool:
        """True if there is no such object, or no such kind of objects."""
        return self.code == http.client.NOT_FOUND

    @property
    def is_forbidden(self) -> bool:
        """True if the account lacks the right."""
        return self.code == http.client.FORBIDDEN

    @property
    def exists_already(self) -> bool:
        """True if an object of this name exists already."""
        return self.code == http.client.CONFLICT


class KubernetesApi:
    """The API server of a context of the kubeconfig file.

    Args:
        context: its name; '' for the current one.
        namespace: '' for that of the context.

    Raises:
        ConfigError: the package is missing, or there is no such context.
    """

    def __init__(self, context: str = "", namespace: str = "") -> None:
        if importlib.util.find_spec("kubernetes") is None:
            raise ConfigError(
                "the package kubernetes is missing", place="cluster.kind", remedy=_INSTALL
            )
        from kubernetes import config

        # Named, because the client looks at the variable only when it is imported.
        file = os.environ.get("KUBECONFIG")
        try:
            contexts, current = config.list_kube_config_contexts(file)
            chosen = next(
                entry for entry in contexts if entry["name"] == (context or current["name"])
            )
            self._client = config.new_client_from_config(file, context or None)
        except (config.ConfigException, OSError, StopIteration) as error:
            cause = f"there is no context {context}" if context else _first_line(error)
            raise ConfigError(
                cause or "there is no current context",
                place="cluster.kubernetes.context",
                remedy="`kubectl config get-contexts` lists them; KUBECONFIG names the file",
            ) from None
        # Whoever follows a run asks again anyway; a first question must not hang.
        self._client.configuration.retries = False
        self.server = str(self._client.configuration.host)
        self.namespace = namespace or str(chosen["context"].get("namespace", "default"))

    def create(self, manifest: Manifest, *, dry_run: bool = False) -> Manifest:
        """Create an object; returns it as the server keeps it. Raises ApiAnswer."""
        query = {"dryRun": "All"} if dry_run else {}
        path = self._path(manifest["kind"])
        return _object(self._request("POST", path, query=query, body=manifest))

    def get(self, kind: str, name: str) -> Manifest | None:
        """An object; None if there is none. Raises ApiAnswer."""
        try:
            return _object(self._request("GET", self._path(kind, name)))
        except ApiAnswer as answer:
            if answer.is_missing:
                return None
            raise

    def select(self, kind: str, *, labels: str = "", fields: str = "") -> list[Manifest]:
        """The objects with these labels and fields ("key=value,key=value"). Raises ApiAnswer."""
        query = {"labelSelector": labels, "fieldSelector": fields}
        query = {key: value for key, value in query.items() if value}
        answer = _object(self._request("GET", self._path(kind), query=query))
        items: list[Manifest] = answer["items"]
        return items

    def patch(self, kind: str, name: str, change: Manifest) -> None:
        """Merge a change into an object. Raises ApiAnswer."""
        path = self._path(kind, name)
        self._request("PATCH", path, body=change, content="application/merge-patch+json")

    def delete(self, kind: str, name: str, *, at_once: bool = False) -> None:
        """Delete an object and what it owns; one that is gone is no error. Raises ApiAnswer."""
        # Background: the answer does not wait for what the object owns.
        options: Manifest = {"propagationPolicy": "Background"}
        if at_once:
            options["gracePeriodSeconds"] = 0
        try:
            self._request("DELETE", self._path(kind, name), body=options)
        except ApiAnswer as answer:
            if not answer.is_missing:
                raise

    def log(self, pod: str, container: str) -> bytes:
        """What a container has written; b"" before it starts and after it is gone."""
        path = f"{self._path('Pod', pod)}/log"
        try:
            return self._request("GET", path, query={"container": container})
        except ApiAnswer as answer:
            # 400: the pod waits, so the container does not exist yet.
            if answer.code in (http.client.NOT_FOUND, http.client.BAD_REQUEST):
                return b""
            raise

    def _path(self, kind: str, name: str = "") -> str:
        path = _OF_CLUSTER.get(kind) or _PATHS[kind].format(f"namespaces/{self.namespace}")
        return f"{path}/{urllib.parse.quote(name, safe='')}" if name else path

    def _request(
        self,
        method: str,
        path: str,
        *,
        query: Mapping[str, str] | None = None,
        body: Manifest | None = None,
        content: str = "application/json",
    ) -> bytes:
        """The body of an answer.

        Raises:
            ApiAnswer: the server refuses.
            ConfigError: it does not answer, or does not know the account.
        """
        from kubernetes.client.exceptions import ApiException
        from urllib3.exceptions import HTTPError

        try:
            # Below the classes of the client, which would drop fields that they do not know.
            answer = self._client.call_api(
                path,
                method,
                query_params=list((query or {}).items()),
                header_params={"Accept": "application/json, */*", "Content-Type": content},
                body=body,
                auth_settings=["BearerToken"],
                _preload_content=False,
                _request_timeout=(_CONNECT_S, _ANSWER_S),
            )
            data: bytes = answer.data
            return data
        except ApiException as error:
            if error.status == http.client.UNAUTHORIZED:
                raise self._unreachable("refuses the credentials of the context") from None
            raise ApiAnswer(int(error.status or 0), _cause(error)) from None
        except (HTTPError, OSError) as error:
            raise self._unreachable(f"does not answer ({_first_line(error)})") from None

    def _unreachable(self, cause: str) -> ConfigError:
        return ConfigError(
            cause,
            place=self.server,
            remedy="see `kubectl cluster-info`; cluster.kubernetes.context names another cluster",
        )


def _object(answer: bytes) -> Manifest:
    decoded: Manifest = json.loads(answer)
    return decoded


def _cause(error: Any) -> str:
    """The server's message: of its JSON, else the word of HTTP."""
    try:
        return str(json.loads(error.body)["message"])
    except (ValueError, KeyError, TypeError):
        return str(error.reason)


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]
