"""The entry point of a RayJob: the log of the run, exit codes, versions, retries."""

from __future__ import annotations

import http.server
import importlib.metadata
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.cluster.code_package import code_digest
from pipeline.cluster.kubernetes_jobs import output_of_driver
from tests.config.jobs import ROOT

pytestmark = pytest.mark.slow
# As in a pod, except for the place of the job and the driver's command.
PROGRAM = """
import sys
from pipeline.cluster import pod_driver
pod_driver.JOB_FOLDER = sys.argv[1]
pod_driver._API = sys.argv[2] + "/api/jobs/{}/stop"
pod_driver._MODULE = ["-c", sys.argv[3]]
sys.exit(pod_driver.main())
"""


class Jobs(http.server.ThreadingHTTPServer):
    """Ray's Jobs API, as far as a request to stop a job goes: it sends SIGTERM."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.stopped: list[tuple[str, str]] = []  # (path, Authorization)
        self.process: subprocess.Popen[bytes] | None = None


class Handler(http.server.BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        assert isinstance(self.server, Jobs)
        self.server.stopped.append((self.path, self.headers["Authorization"]))
        self.send_response(200)
        self.end_headers()
        assert self.server.process is not None
        self.server.process.terminate()

    def log_message(self, format: str, *arguments: object) -> None:
        pass


@pytest.fixture
def jobs() -> Iterator[Jobs]:
    with Jobs() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def drive(folder: Path, jobs: Jobs, driver: str, **described: str) -> tuple[int, bytes]:
    """(exit code, output) of the entry point, with ``driver`` (Python) as the driver."""
    arguments = {
        "arguments": ["run"],
        "log": str(folder / "logs" / "driver.log"),
        "ray": importlib.metadata.version("ray"),
        "code": code_digest(),
        **described,
    }
    (folder / "arguments.json").write_text(json.dumps(arguments))
    submission = {"metadata": {"job_submission_id": "a-1-x"}}
    jobs.process = subprocess.Popen(
        [
            *(sys.executable, "-c", PROGRAM, str(folder)),
            *(f"http://127.0.0.1:{jobs.server_address[1]}", driver),
        ],
        stdout=subprocess.PIPE,
        cwd=ROOT,
        env=os.environ
        | {
            "PIPELINE_JOB": "a-1",
            "RAY_ADDRESS": "10.0.0.1:6379",
            "RAY_AUTH_TOKEN": "t",
            "RAY_JOB_CONFIG_JSON_ENV_VAR": json.dumps(submission),
        },
    )
    output, _ = jobs.process.communicate(timeout=120)
    return jobs.process.returncode, output


TELL = "import os; print(os.environ['PIPELINE_RAY_ADDRESS'], os.environ['PIPELINE_RESTARTS'])"


def test_the_log_of_the_run_has_all_attempts_and_the_pod_its_own(
    tmp_path: Path, jobs: Jobs
) -> None:
    interrupted = f"{TELL}; import sys; sys.exit(75)"
    code, first = drive(tmp_path, jobs, interrupted)
    assert code == 75
    assert b"10.0.0.1:6379 0\n" in first
    code, second = drive(tmp_path, jobs, TELL)
    assert code == 0
    assert b"10.0.0.1:6379 1\n" in second
    log = (tmp_path / "logs" / "driver.log").read_bytes()
    assert log == first + second
    assert output_of_driver(b"header\n" + second + b"trailer\n") == (second, len(first))
    # Neither is a failure that would only be repeated.
    assert not jobs.stopped


def test_a_driver_that_failed_for_good_is_not_started_again(tmp_path: Path, jobs: Jobs) -> None:
    code, output = drive(tmp_path, jobs, "import sys; sys.exit(2)")
    assert code == -15
    assert output.endswith(b"the driver ended with exit code 2\n")
    assert jobs.stopped == [("/api/jobs/a-1-x/stop", "Bearer t")]


@pytest.mark.parametrize(
    ("driver", "expected"),
    [
        ("import os; os.kill(os.getpid(), 9)", 137),
        ("import os; os._exit(1)", 1),  # Ray ends processes like this when its head is gone
    ],
)
def test_a_driver_that_was_ended_from_outside_is_started_again(
    tmp_path: Path, jobs: Jobs, driver: str, expected: int
) -> None:
    code, output = drive(tmp_path, jobs, driver)
    assert code == expected
    assert output.endswith(f"the driver ended with exit code {expected}\n".encode())
    assert not jobs.stopped


def test_an_image_with_another_ray_is_refused(tmp_path: Path, jobs: Jobs) -> None:
    _, output = drive(tmp_path, jobs, TELL, ray="2.50.0")
    assert b"the machine that submitted the job 2.50.0" in output
    assert b"-> build the image" in output
    assert output.endswith(b"the driver ended with exit code 2\n")
    assert b"10.0.0.1" not in output


def test_an_image_with_other_code_is_reported(tmp_path: Path, jobs: Jobs) -> None:
    code, output = drive(tmp_path, jobs, TELL, code="0")
    assert code == 0
    assert b"warning: the image has other code" in output


def test_a_long_log_is_marked_again_and_again(tmp_path: Path, jobs: Jobs) -> None:
    code, output = drive(tmp_path, jobs, "for i in range(40_000): print('x' * 79)")
    assert code == 0
    log = (tmp_path / "logs" / "driver.log").read_bytes()
    assert log == output
    late, start = output_of_driver(output[-2_200_000:])
    assert start > 500_000
    assert log[start:] == late
