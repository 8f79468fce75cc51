"""The commands about runs do the same on this machine, with Ray, Slurm and Kubernetes."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from pipeline.errors import Detached, Interrupted, StageError
from tests.cluster.processes import wait_until
from tests.cluster.sites import (
    END_S,
    Command,
    Site,
    kubernetes_site,
    local_site,
    ray_site,
    slurm_site,
)

KINDS = ("local", "ray", "slurm", "kubernetes")
CLUSTERS = {"ray": ray_site, "slurm": slurm_site, "kubernetes": kubernetes_site}


@pytest.fixture(scope="module", params=KINDS)
def site(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Site]:
    if request.param == "kubernetes":
        request.getfixturevalue("shared")  # KubeRay's definition
    folder = tmp_path_factory.mktemp(request.param)
    if request.param == "local":
        yield local_site(folder)
    else:
        with CLUSTERS[request.param](folder) as made:
            yield made


def line_of(site: Site, name: str) -> str:
    """The line of a run in the list of runs, with single spaces."""
    code, output = site.call("runs")
    assert code == 0, output
    lines = [" ".join(line.split()) for line in output.splitlines()]
    return next((line for line in lines if line.startswith(f"{name} ")), "")


def test_a_run_is_followed_stopped_resumed_and_found_done(site: Site) -> None:
    # 1. It stops after a checkpoint, and the command that follows it ends.
    first = site.start("run", "job.yaml", *site.options)
    first.wait_for("checkpoint at step 15 written")
    code, output = site.call("stop", "small")
    assert code == 0, output
    assert first.end() == Interrupted.exit_code, first.output
    assert line_of(site, "small").startswith("small interrupted pretrain ")
    code, output = site.call("stop", "small")
    assert code == 2
    assert "the run is not under way" in output
    # 2. The first command resumes it. The list knows it, and its messages can be followed.
    second = site.start("run", "job.yaml", *site.options)
    _try_a_second_time(site, second)
    second.wait_for("resuming from step")
    followed = site.start("logs", "small", "-f")
    line = line_of(site, "small")
    assert re.match(r"small running (pretrain step \d+/540|export) ", line), line
    if site.kind != "local":
        assert f" {site.kind} " in line
    assert second.end() == 0, second.output
    assert followed.end() == 0
    assert "export: done" in followed.output
    output = second.output
    assert "pretrain 540/540" in output
    assert re.search(r"^pretrain +done", output, re.MULTILINE), output
    stopped_at = max(map(int, re.findall(r"checkpoint at step (\d+)", first.output)))
    resumed = re.search(r"resum\w+ .*?step (\d+)", output)
    assert resumed is not None, output
    assert int(resumed[1]) == stopped_at
    # 3. It is done: nothing is left to do, and its results are here.
    code, output = site.run()
    assert code == 0
    assert "nothing to do: every stage is up to date" in output
    assert line_of(site, "small").startswith("small done ")
    code, output = site.call("fetch", "small", "export")
    assert code == 0, output
    export = Path(output.splitlines()[-1])
    assert export == site.folder / "runs" / "small" / "export"
    assert (export / "model.safetensors").stat().st_size > 1000
    _curves_are_served(site)
    code, output = site.call("logs", "small", "--rank", "1")
    assert code == 0, output
    code, output = site.call("logs", "small", "--rank", "7")
    assert code != 0
    assert "rank 7 has written nothing" in output


def _curves_are_served(site: Site) -> None:
    """TensorBoard shows the run, on loopback, where the user sits; or beside its volume."""
    if site.kind == "kubernetes":
        code, output = site.call("tensorboard", "small")
        assert code == 0, output
        kinds = [manifest["kind"] for manifest in yaml.safe_load_all(output)]
        assert kinds == ["Deployment", "Service"]
        assert "port-forward service/tensorboard-small-" in output
        return
    served = site.start("tensorboard", "small", "--port", "6123")
    ask = "import urllib.request as u; print(u.urlopen('http://127.0.0.1:6123/data/runs').read())"
    python = [sys.executable, "-c", ask]
    answer = ""

    def answers() -> bool:
        nonlocal answer
        if site.machine is None:
            done = subprocess.run(python, capture_output=True, text=True, check=False)
        else:
            done = site.machine.run(*python, check=False)
        answer = done.stdout
        return done.returncode == 0 and "pretrain" in answer

    wait_until(answers, "TensorBoard with the run", END_S, poll_s=0.5)
    served.interrupt()
    served.end()


def _try_a_second_time(site: Site, first: Command) -> None:
    """The same command while the run is under way: never two jobs on one run."""
    if site.kind == "local":
        first.wait_for("resuming from step")
        code, output = site.run()
        assert code == 2
        assert "is working on this run" in output
        return
    # Early, since the small job has other commands to answer before it ends.
    first.wait_for("submitted: job ")
    code, output = site.run("-d")
    assert code == 0
    assert "already under way: job " in output
    attached = site.start("run", "job.yaml", *site.options)
    attached.wait_for("already under way: job ")
    # A job that runs already is shown from its last lines on.
    attached.wait_for_match(r"resuming from step|checkpoint at step \d+ written")
    attached.interrupt()
    assert attached.end() == Detached.exit_code
    assert "which continues" in attached.output
    assert "pipeline logs small -f; to stop it: pipeline stop small" in attached.output


def test_a_job_that_fails_has_its_own_exit_code(site: Site) -> None:
    # Of the data: one image of ten is unusable.
    code, output = site.run("--set", "name=data", "--set", "data.synthetic.corrupt_fraction=0.1")
    assert code == 2, output
    assert "images are unusable" in output
    assert line_of(site, "data").startswith("data failed prepare ")
    # Of a stage: its weights are not finite.
    diverges = ("--set", "stages.pretrain.base_lr=1e30", "--set", "stages.pretrain.epochs=1")
    code, output = site.run("--set", "name=stage", *diverges)
    assert code == StageError.exit_code, output
    assert line_of(site, "stage").startswith("stage failed ")


def test_a_detached_run_can_be_ended_at_once(site: Site) -> None:
    name = ("--set", "name=detached", "--set", "stages.pretrain.epochs=1000")
    if site.kind == "local":
        command = site.start("run", "job.yaml", *name)
    else:
        code, output = site.run(*name, "-d")
        assert code == 0, output
        assert "submitted: job " in output
    wait_until(lambda: " step " in line_of(site, "detached"), "the first step", END_S, poll_s=1.0)
    code, output = site.call("stop", "detached", "--now")
    assert code == 0, output
    if site.kind == "local":
        assert command.end() == Detached.exit_code  # as after a second Ctrl-C
    assert line_of(site, "detached").split()[1] != "running"


on_slurm = pytest.mark.parametrize("site", ["slurm"], indirect=True)


@on_slurm
@pytest.mark.parametrize(("key", "value"), [("partition", "nowhere"), ("constraint", "unheard-of")])
def test_what_slurm_does_not_know_is_refused_before_submission(
    site: Site, key: str, value: str
) -> None:
    code, output = site.run("--set", "name=refused", "--set", f"cluster.slurm.{key}={value}")
    assert code == 2, output
    assert f"cluster.slurm.{key}" in output
    assert "\n  -> " in output
    assert line_of(site, "refused") == ""


@on_slurm
def test_a_job_that_waits_shows_why_and_until_when(site: Site) -> None:
    later = ("--set", "name=later", "--set", "cluster.slurm.extra=[--begin=now+1hour]")
    code, output = site.run(*later, "-d")
    assert code == 0, output
    line = line_of(site, "later")
    assert re.match(r"later pending: BeginTime, expected start 20[\d-]+ [\d:]+ ", line), line
    attached = site.start("run", "job.yaml", *site.options, *later)
    attached.wait_for("waits: BeginTime, expected start")
    attached.interrupt()
    assert attached.end() == Detached.exit_code
    code, output = site.call("stop", "later")
    assert code == 0, output
    assert line_of(site, "later").startswith("later interrupted")


def test_doctor_names_every_check(site: Site) -> None:
    code, output = site.call("doctor", "job.yaml", *site.options)
    assert code == 0, output
    checks = re.findall(r"^check ([a-z ]+):", output, re.MULTILINE)
    assert {"run directory", "data", "space", "versions", "code", "clock", "limits"} <= set(checks)
    assert "1 machines checked in" in output
