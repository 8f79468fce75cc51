"""Storage that one of two machines does not share: named before the first stage.

Without the checks, every checkpoint fails, and the run says so: rank 0 looks at every file.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from pipeline.layout import RunDir
from pipeline.orchestrate import preflight
from tests.cluster import training_events
from tests.cluster.fabric import Fabric
from tests.cluster.ray_machines import RayMachines
from tests.cluster.ray_runs import ClusterRun, PreparedJob

# Rank 1, on the second machine, owns half of the optimizer's state: it writes a file.
SETTINGS = ("--set", "stages.pretrain.zero_stage=1", "--set", "stages.pretrain.max_steps=12")


class Site:
    """Two machines with Ray, and a job whose data is prepared."""

    def __init__(self, fabric: Fabric, folder: Path) -> None:
        self.folder = folder
        self.job = PreparedJob(folder)
        self.ray = RayMachines(folder=folder)
        self.first = fabric.up("n1")
        self.second = fabric.up("n2")
        self.job.prepare()
        self.ray.head(self.first, "--cpus", "2")
        self.ray.join(self.second, "--cpus", "2")

    def start(self, run_dir: RunDir, *arguments: str, checks: bool = True) -> ClusterRun:
        environment = {} if checks else {preflight.OFF: "1"}
        return ClusterRun.start(
            self.first,
            self.ray,
            self.job.on_cluster(),
            run_dir,
            *SETTINGS,
            *arguments,
            environment=environment,
        )


@pytest.fixture(scope="module")
def site(fabric: Fabric, shared_folder: Path) -> Site:
    return Site(fabric, shared_folder)


def refused(site: Site, run_dir: RunDir, hidden: Path, *settings: str) -> str:
    """The output of a run that is refused because the second machine does not see a folder."""
    site.second.hide(hidden)
    try:
        run = site.start(run_dir, *(part for text in settings for part in ("--set", text)))
        output = run.finish(3)
        assert not training_events.pretraining(run.run_dir)
        # Nothing was written into the folder that only this machine sees.
        assert not site.second.run("find", hidden, "-mindepth", "1").stdout
    finally:
        site.second.show(hidden)
    assert not list(run_dir.path.rglob(".check-*"))
    return output


@pytest.mark.parametrize("hidden", ["", "checkpoints"], ids=["run directory", "checkpoints"])
def test_a_folder_that_one_machine_does_not_share_is_named(site: Site, hidden: str) -> None:
    run_dir = site.job.start_copy(f"hidden-{hidden}")
    folder = run_dir.path / hidden
    folder.mkdir(exist_ok=True)
    output = refused(site, run_dir, folder)
    cause = f"n2 (10.77.0.2): {folder} is another folder than the driver's, or is not mounted"
    assert f"check run directory: {cause}" in output
    assert "-> mount the same file system there on every machine, writable" in output
    assert "1 of 2 machines are fit for the job, and it needs 2" in output
    assert run_dir.unfit.read_text() == "n2\n"


def test_data_that_one_machine_does_not_see_is_named(site: Site) -> None:
    """Prepared data outside of the run directory; and a source that is still to be prepared."""
    data = site.folder / "data"
    shutil.copytree(RunDir(site.job.base).dataset("images"), data)
    run_dir = RunDir(site.folder / "without-data")
    run_dir.path.mkdir()
    settings = ("data.root=", f"data.prepared={data}", "stages.prepare=null")
    output = refused(site, run_dir, data, *settings)
    assert "check data: n2 (10.77.0.2): data.images.prepared is another folder" in output
    source = site.folder / "images"
    fresh = RunDir(site.folder / "without-source")
    fresh.path.mkdir()
    output = refused(site, fresh, source)
    assert "check data: n2 (10.77.0.2): data.images.root is another folder" in output


def test_without_the_checks_a_checkpoint_that_lacks_a_file_is_a_failure(site: Site) -> None:
    run_dir = site.job.start_copy("unchecked")
    checkpoints = run_dir.checkpoints("pretrain")
    checkpoints.mkdir(parents=True)
    site.second.hide(checkpoints)
    try:
        output = site.start(run_dir, checks=False).finish(3)
    finally:
        site.second.show(checkpoints)
    cause = "the file of rank 1, written on n2, is not on n1: the machines do not share"
    assert f"checkpoint at step 6 could not be written, training continues: {cause}" in output
    assert f"the final checkpoint cannot be written: {cause}" in output
    assert "at step 6 written" not in output
    assert not list(checkpoints.iterdir())
    state = json.loads(run_dir.run_json.read_text())["stages"]["pretrain"]
    assert state["state"] == "failed"
    # Once the folder is shared, the same command trains from the start, and its checkpoints hold.
    output = site.start(run_dir).finish()
    assert "checkpoint at step 12 written" in output
