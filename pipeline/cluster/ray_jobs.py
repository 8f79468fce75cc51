"""Kind ray: submits drivers to a Ray cluster that exists, through its Jobs API.

The only module of this room that imports Ray. Each client sends its own token with its requests,
so that one process can ask several clusters; Ray's own setting of a token is one per process.
"""

from __future__ import annotations

import contextlib
import http.client
import importlib.metadata
import importlib.util
import json
import logging
import os
import re
import secrets
import shlex
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.cluster.code_package import JOB_FILE, code_digest, write_package
from pipeline.cluster.launcher import JobState, Phase, Submission, cause_in
from pipeline.config.schema import ClusterConfig
from pipeline.errors import ConfigError, StageError
from pipeline.runtime import environment

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

_INSTALL = 'run "./launch.sh install ray" in a checkout, else pip install "revcol-pipeline[ray]"'
_ANSWER_S = 2.0  # for an answer of the dashboard; Ray's own client waits for 20 s
_CALL_S = 120.0  # longest time of a short command on the cluster
_POLL_S = 0.3
_PHASES: dict[str, Phase] = {"PENDING": "pending", "RUNNING": "running"}
_REFUSED = (401, 403)
# Ray's client lets these replace the address that it is given.
_OTHER_ADDRESSES = ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS")
_TALKATIVE = ("ray.dashboard.modules.dashboard_sdk", "ray._private.runtime_env.packaging")
# Lines that Ray adds to the output of a driver.
_OF_RAY = re.compile(rb"^(\S+ \S+\s+INFO job_manager\.py|Running entrypoint for job ).*\n?", re.M)


class RayJobs:
    """The launcher of a Ray cluster. See ``launcher.Launcher``.

    Args:
        address: of the dashboard, such as http://head:8265.
        token_file: file of the access token; '' if the cluster asks for none.
    """

    def __init__(self, address: str, token_file: str = "") -> None:
        self._address = address.rstrip("/")
        self._token_file = token_file

    def check(self, submission: Submission) -> None:
        """Ask for the version of Ray: whether the cluster answers, and accepts the token.

        Raises:
            ConfigError: it does not, or runs another version.
        """
        # The client and the cluster exchange private formats: only equal versions are tested.
        there = self._version()
        here = importlib.metadata.version("ray")
        if there != here:
            raise ConfigError(
                f"the cluster runs Ray {there}, this machine Ray {here}",
                place=self._address,
                remedy=f"install Ray {here} on the cluster, or the pipeline that belongs to "
                f"Ray {there} here",
            )

    def render(self, submission: Submission) -> str:
        """The request to the Jobs API, as JSON, and the job."""
        request = {
            "address": self._address,
            "token_file": self._token_file,
            "entrypoint": _entry_point(submission),
            "runtime_env": {
                "working_dir": f"the pipeline's code ({code_digest()})",
                "env_vars": _environment(submission.cluster),
            },
            "metadata": {"run": submission.name},
        }
        return f"{json.dumps(request, indent=2, ensure_ascii=False)}\n---\n{submission.job_text}"

    def submit(self, submission: Submission) -> str:
        """Send the code and the job, and start the driver."""
        self.check(submission)
        # The ID becomes the name of a log file on the head. The random part keeps it unlike that of
        # a run of the same name in another folder, or by another user.
        return self._start(
            entry_point=_entry_point(submission),
            job_id=f"{_slug(submission.name)}-{submission.attempt}-{secrets.token_hex(4)}",
            environment=_environment(submission.cluster),
            metadata={"run": submission.name},
            job_text=submission.job_text,
        )

    def state(self, job_id: str) -> JobState:
        """What Ray knows of a job. Ray forgets its jobs when its head ends."""
        details = self._details(job_id)
        if details is None:
            return JobState(phase="unknown", reason="the Ray cluster does not know the job")
        status = str(details["status"])
        # Milliseconds. Ray also reports an end of jobs that have none yet.
        started, ended = (
            details[key] / 1000 if details.get(key) else None for key in ("start_time", "end_time")
        )
        phase = _PHASES.get(status, "ended")
        return JobState(
            phase=phase,
            reason=status if phase == "ended" else "",
            started=started,
            ended=ended if phase == "ended" else None,
            exit_code=details.get("driver_exit_code"),
        )

    def stop(self, job_id: str, *, now: bool) -> None:
        """Send SIGTERM to the driver, with the grace in its environment; ``now``: SIGQUIT too."""
        details = self._details(job_id)
        if details is None or details["status"] not in _PHASES:
            return
        driver = details.get("driver_info") or {}
        with self._client() as client:
            client.stop_job(job_id)
        if now and driver.get("pid"):
            # The Jobs API has no signal that ends a driver before the grace is over. It starts all
            # drivers on the head, so another one can send it.
            self._run_to_end(f"kill -QUIT {int(driver['pid'])} || true")  # it may have ended

    def log(self, job_id: str, run_dir: Path, offset: int) -> bytes:
        """The output of the driver beyond ``offset`` bytes, without lines that Ray adds."""
        if self._details(job_id) is None:
            return b""
        # Ray hands out the log as a whole.
        with self._client() as client:
            text: str = client.get_job_logs(job_id)
        return _OF_RAY.sub(b"", text.encode())[offset:]

    def call(self, cluster: ClusterConfig, arguments: Sequence[str]) -> str:
        """Run a short command of the pipeline on the head of the cluster."""
        self._version()
        return self._run_to_end(shlex.join(["python", "-m", "pipeline", *arguments]))

    def viewer(self, name: str, run_dir: Path) -> str:
        """Nothing of that kind: the files are brought to this machine."""
        return ""

    def _run_to_end(self, entry_point: str) -> str:
        """The output of a short driver. Raises StageError if it fails."""
        job_id = f"call-{secrets.token_hex(6)}"
        self._start(entry_point=entry_point, job_id=job_id, environment={}, metadata={})
        deadline = time.monotonic() + _CALL_S
        while (state := self.state(job_id)).under_way and time.monotonic() < deadline:
            time.sleep(_POLL_S)
        output = self.log(job_id, Path(), 0).decode(errors="replace")
        if state.exit_code != 0:
            raise StageError(
                f"`{entry_point}` failed on the cluster: {cause_in(output) or state.reason}",
                place=self._address,
            )
        with self._client() as client, contextlib.suppress(RuntimeError):
            client.delete_job(job_id)  # the list of jobs is for runs
        return output

    def _start(
        self,
        *,
        entry_point: str,
        job_id: str,
        environment: dict[str, str],
        metadata: dict[str, str],
        job_text: str = "",
    ) -> str:
        with tempfile.TemporaryDirectory() as folder, self._client() as client:
            write_package(Path(folder), job_text)
            try:
                accepted: str = client.submit_job(
                    entrypoint=entry_point,
                    submission_id=job_id,
                    runtime_env={"working_dir": folder, "env_vars": environment},
                    metadata=metadata,
                )
            except RuntimeError as error:
                raise ConfigError(
                    f"the cluster refuses the job: {_first_line(error)}", place=self._address
                ) from None
        return accepted

    def _details(self, job_id: str) -> dict[str, Any] | None:
        """What the API says about a job; None if it does not know it."""
        try:
            details: dict[str, Any] = self._get(f"/api/jobs/{job_id}")
            return details
        except urllib.error.HTTPError as error:
            if error.code == http.client.NOT_FOUND:
                return None
            raise self._unreachable(f"answers with {error.code} {error.reason}") from None

    def _version(self) -> str:
        try:
            return str(self._get("/api/version")["ray_version"])
        except (urllib.error.HTTPError, KeyError, ValueError):
            raise self._unreachable("is not the dashboard of a Ray cluster") from None

    def _get(self, path: str) -> Any:
        """The JSON answer of the dashboard.

        Raises:
            ConfigError: no answer in time, or the token is refused.
            HTTPError: any other answer than JSON.
        """
        request = urllib.request.Request(self._address + path, headers=self._headers())
        try:
            with urllib.request.urlopen(request, timeout=_ANSWER_S) as answer:
                return json.loads(answer.read())
        except urllib.error.HTTPError as error:
            if error.code in _REFUSED:
                raise self._refused(error.code) from None
            raise
        except (OSError, http.client.HTTPException) as error:
            cause = error.reason if isinstance(error, urllib.error.URLError) else error
            raise self._unreachable(f"does not answer ({cause})") from None

    def _headers(self) -> dict[str, str]:
        if not self._token_file:
            return {}
        # Read for every request: a site may replace its token while a run is followed.
        try:
            token = Path(self._token_file).expanduser().read_text(encoding="ascii").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(
                f"cannot read the access token: {getattr(error, 'strerror', 'not a token')}",
                place=self._token_file,
                remedy="cluster.ray.token_file: the file that the cluster's administrator gave you",
            ) from None
        return {"Authorization": f"Bearer {token}"}

    def _refused(self, code: int) -> ConfigError:
        if not self._token_file:
            remedy = "cluster.ray.token_file: the file that holds the cluster's access token"
            return ConfigError("refused: it asks for a token", place=self._address, remedy=remedy)
        return ConfigError(
            f"refused ({code}): the token in {self._token_file} is not the cluster's",
            place=self._address,
            remedy="ask the cluster's administrator for its present token",
        )

    def _unreachable(self, cause: str) -> ConfigError:
        return ConfigError(
            cause,
            place=self._address or "cluster.ray.address",
            remedy="cluster.ray.address: the address of the cluster's dashboard, http://HOST:8265, "
            "which this machine must reach",
        )

    @contextlib.contextmanager
    def _client(self) -> Iterator[JobSubmissionClient]:
        """Ray's client. It has no limit of time, so ask ``_version`` first."""
        # Ray's client imports it, and would report another package as missing.
        if importlib.util.find_spec("aiohttp") is None:
            raise ConfigError(
                "the package aiohttp is missing, which Ray's client of its Jobs API needs",
                place="cluster.kind: ray",
                remedy=_INSTALL,
            )
        from ray.job_submission import JobSubmissionClient

        # They report each upload as a message of its own.
        for name in _TALKATIVE:
            logging.getLogger(name).setLevel(logging.WARNING)
        # A driver of Ray that submits, and a shell set up for another cluster, have these.
        hidden = {name: os.environ.pop(name) for name in _OTHER_ADDRESSES if name in os.environ}
        try:
            client = JobSubmissionClient(self._address, headers=self._headers())
        except (ConnectionError, RuntimeError) as error:
            raise self._unreachable(_first_line(error)) from None
        finally:
            os.environ.update(hidden)
        yield client


def _entry_point(submission: Submission) -> str:
    """The driver's command line. Ray runs it in a shell, with the address of its own cluster."""
    arguments = ["-m", "pipeline", submission.verb, JOB_FILE, *submission.options]
    return f'PIPELINE_RAY_ADDRESS="$RAY_ADDRESS" exec python {shlex.join(arguments)}'


def _environment(cluster: ClusterConfig) -> dict[str, str]:
    # Ray kills a driver 3 s after the request to stop it, unless its own environment has this.
    return {**environment.ray_job(cluster.grace), "PYTHONUNBUFFERED": "1"}


def _slug(name: str) -> str:
    """A name as part of a job ID: "Größe; rm -rf x" -> "Gr-e-rm-rf-x"."""
    return re.sub(r"[^A-Za-z0-9_]+", "-", name).strip("-")[:40] or "run"


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]
