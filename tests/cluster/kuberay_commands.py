"""The commands that KubeRay writes into pods."""

from __future__ import annotations

from tests.cluster.api_server import Object

DASHBOARD = "http://127.0.0.1:8265"


def submit_command(job: Object, status: Object) -> str:
    """What the submitter runs, as KubeRay's common/job.go writes it."""
    ask = f"import urllib.request as u; u.urlopen('{DASHBOARD}/api/gcs_healthz', timeout=2)"
    wait = (
        f'until python -c "{ask}" >/dev/null 2>&1 ; do echo "Waiting for Ray" ; sleep 2 ; done ; '
    )
    submit = f"ray job submit --address {DASHBOARD} --submission-id {status['jobId']}"
    return f"{wait}{submit} -- {job['spec']['entrypoint'].strip()} ;"


def flags(parameters: dict[str, str]) -> str:
    """Options of `ray start`."""
    # A flag without a value is "true" there.
    return " ".join(f"--{key}={value}".removesuffix("=true") for key, value in parameters.items())
