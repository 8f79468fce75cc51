"""The entry point of a RayJob: runs the driver, and keeps its output on the run's volume.

Runs in the head's pod, started by Ray's Jobs API. It has no arguments: they lie beside the job, in
the mounted ConfigMap.

1. The output of the driver goes to the pod's log and, byte for byte, to a file of the run, which
   outlives all pods. Marks tell which place of the file a line of the pod's log is at: the first
   line of each attempt, and one per MiB, because machines keep only the end of a long log.
2. KubeRay starts a new cluster whenever its Ray job fails. That is right for a driver that was
   interrupted (75), killed, or ended by Ray. An error of the job would only be repeated, with all
   GPUs allocated: then this process has the Ray job stopped, which KubeRay takes for the end of
   the RayJob.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import re
import selectors
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, BinaryIO

from pipeline.cluster.code_package import code_digest
from pipeline.cluster.kubernetes_manifests import ARGUMENTS
from pipeline.cluster.kubernetes_pods import JOB_FOLDER
from pipeline.errors import ConfigError, PipelineError, StageError
from pipeline.runtime import environment

# A mark: "attempt 2 of job a-0f1e2d3c-1, byte 4711 of its log"; the last line of an attempt.
MARK = re.compile(rb"^attempt (\d+) of job \S+, byte (\d+) of its log\n", re.MULTILINE)
ENDED = re.compile(rb"the driver ended with exit code (\d+)\n")

# An error of the job or its data, of a stage, of the pipeline itself.
FINAL = (ConfigError.exit_code, StageError.exit_code, 70)

_MODULE = ["-m", "pipeline"]
_FORWARDED = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)
_API = "http://127.0.0.1:8265/api/jobs/{}/stop"
_CHUNK = 1 << 16  # bytes
_MARK_EVERY = 1 << 20  # bytes
_POLL_S = 0.2
_ANSWER_S = 10.0
_STOP_S = 60.0  # until Ray has sent SIGTERM


def main() -> int:
    """Run the driver; returns its exit code."""
    described: dict[str, Any] = json.loads((Path(JOB_FOLDER) / ARGUMENTS).read_text())
    with _Output.to(described["log"]) as output:
        output.write(output.mark)
        try:
            _check_versions(described, output)
            code = _run_driver(described["arguments"], output)
        except PipelineError as error:
            output.write(f"error: {error.message}\n".encode())
            code = error.exit_code
        output.write(f"the driver ended with exit code {code}\n".encode())
    if code in FINAL:
        _stop_ray_job()
    return code


@dataclass(kw_only=True)
class _Output:
    """Writes to the pod's log, and to the log of the run if there is one.

    ``size``: bytes in the log of the run; ``attempt``: number of this one, from 1.
    """

    log: BinaryIO | None
    size: int
    attempt: int
    _marked: int = 0  # place of the last mark

    @classmethod
    @contextlib.contextmanager
    def to(cls, path: str) -> Iterator[_Output]:
        """An output that continues the log at ``path``; '': there is none."""
        if not path:
            yield cls(log=None, size=0, attempt=1)
            return
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        with open(path, "a+b", buffering=0) as log:
            log.seek(0)
            earlier = log.read()
            attempts = [int(attempt) for attempt, _ in MARK.findall(earlier)]
            yield cls(log=log, size=len(earlier), attempt=max(attempts, default=0) + 1)

    @property
    def mark(self) -> bytes:
        """A line that tells at which place of the log it is."""
        job = environment.job_id()
        return f"attempt {self.attempt} of job {job}, byte {self.size} of its log\n".encode()

    def write(self, output: bytes) -> None:
        """Write complete or incomplete lines."""
        at_line_end = output.endswith(b"\n")
        if self.log is not None:
            self.log.write(output)
        self.size += len(output)
        sys.stdout.buffer.write(output)
        sys.stdout.buffer.flush()
        if at_line_end and self.size - self._marked > _MARK_EVERY:
            self._marked = self.size
            self.write(self.mark)


def _check_versions(described: dict[str, Any], output: _Output) -> None:
    """Compare this image with the machine that submitted the job.

    Raises:
        ConfigError: another Ray, for which the pods were not rendered.
    """
    version = importlib.metadata.version("ray")
    if version != described["ray"]:
        raise ConfigError(
            f"the image has Ray {version}, the machine that submitted the job {described['ray']}",
            place="cluster.kubernetes.image",
            remedy="build the image from the checkout that submits (docker/Dockerfile)",
        )
    if described["code"] != code_digest():
        output.write(b"warning: the image has other code than the machine that submitted the job\n")


def _run_driver(arguments: list[str], output: _Output) -> int:
    """Run the command, with its output written; its exit code as a shell reports it."""
    driver = subprocess.Popen(
        [sys.executable, *_MODULE, *arguments],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=os.environ
        | environment.kubernetes_driver(output.attempt - 1)
        | {"PIPELINE_RAY_ADDRESS": os.environ["RAY_ADDRESS"]},
    )

    def forward(number: int, frame: FrameType | None) -> None:
        with contextlib.suppress(ProcessLookupError):
            driver.send_signal(number)

    for number in _FORWARDED:
        signal.signal(number, forward)
    assert driver.stdout is not None
    descriptor = driver.stdout.fileno()
    os.set_blocking(descriptor, False)
    with selectors.DefaultSelector() as selector:
        selector.register(descriptor, selectors.EVENT_READ)
        while True:
            # Asked first: what was written before the end is still read. A process that the driver
            # has left behind may keep the pipe open, so its end is not awaited.
            ended = driver.poll() is not None
            if selector.select(_POLL_S):
                if not (chunk := os.read(descriptor, _CHUNK)):
                    break
                output.write(chunk)
            elif ended:
                break
    code = driver.wait()
    return code if code >= 0 else 128 - code


def _stop_ray_job() -> None:
    """Have Ray stop the job of this process: SIGTERM ends it."""
    token = os.environ.get("RAY_AUTH_TOKEN", "")
    request = urllib.request.Request(
        _API.format(environment.ray_submission()),
        method="POST",
        headers={"Authorization": f"Bearer {token}"} if token else {},
    )
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        urllib.request.urlopen(request, timeout=_ANSWER_S).close()
    except OSError as error:  # then KubeRay sees a failed job, and tries again
        print(f"warning: Ray does not stop its job: {error}", flush=True)
        return
    time.sleep(_STOP_S)


if __name__ == "__main__":
    sys.exit(main())
