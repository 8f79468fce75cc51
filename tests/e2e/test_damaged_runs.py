"""Every error about a damaged run names a command, and the command mends the run."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from pipeline.layout import RunDir
from tests.e2e.damages import DAMAGES, MOST_REMEDIES, Damage, apply_remedy, call
from tests.e2e.job_runs import results, run
from tests.prepare.source_folders import class_tars, images, write_tar

pytestmark = pytest.mark.slow
JOB = """
name: small
model: {{channels: [8, 8, 8, 8], depths: [1, 1, 1, 1], columns: 1}}
cluster: {{processes: 1}}
data: {{root: {root}, min_side: 16, shard_rows: 30}}
stages:
  prepare: {{}}
  pretrain:
    {{image_size: 32, epochs: 1, global_batch: 16, precision: fp32, base_lr: 1e-3,
     intermediate_supervision: false, checkpoint_every_steps: 2, augment: {{mixup: 0, cutmix: 0}}}}
  export: {{from: pretrain}}
"""


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The job file of a finished run."""
    folder = tmp_path_factory.mktemp("finished")
    job = folder / "small.yaml"
    job.write_text(JOB.format(root=class_tars(folder / "images", count=16, validation=4)))
    run(job)
    return job


@pytest.fixture
def job(finished: Path, tmp_path: Path) -> Path:
    """The job file of a copy of the finished run."""
    shutil.copytree(finished.parent / "runs", tmp_path / "runs")
    return Path(shutil.copy(finished, tmp_path))


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: str(damage.name))
def test_the_remedies_of_a_damage_mend_it(finished: Path, job: Path, damage: Damage) -> None:
    damage.make(RunDir(job.parent / "runs" / "small"))
    code, out = call(job, damage.call)
    for _ in range(MOST_REMEDIES):
        if code == 0:
            break
        apply_remedy(job, out)
        code, out = call(job, damage.call)
    assert code == 0, out
    run(job)
    assert "nothing to do: every stage is up to date" in run(job)
    assert results(job.parent / "runs" / "small") == results(finished.parent / "runs" / "small")


def test_a_forced_preparation_of_other_images_marks_the_results_of_the_first_ones(
    job: Path,
) -> None:
    """A run never shows metrics of two datasets as if they were one."""
    other = class_tars(job.parent / "other" / "images", count=16, validation=4)
    write_tar(other / "train/c0.tar", images(0, 60))
    root = ("--set", f"data.root={other}")
    code, out = call(job, " ".join(root))
    assert code == 2, out
    assert "3 of 3 steps" in out
    out = run(job, *root, "--stage", "prepare", "--force")
    stages = json.loads((job.parent / "runs/small/run.json").read_text())["stages"]
    assert [stages[stage]["outdated"] for stage in ("pretrain", "export")] == [["dataset"]] * 2
    table = {line.split()[0]: line for line in out.splitlines() if line}
    assert "out of date" in table["pretrain"]
    assert "of an earlier dataset" in table["pretrain"]
    assert "top-1" not in table["pretrain"]
    # The whole job in one command; afterwards nothing is out of date.
    out = run(job, *root, "--force")
    assert "prepare: restarting from scratch (--force)" in out
    assert "out of date" not in out
    assert (job.parent / "runs/small/replaced").is_dir()
    assert "nothing to do" in run(job, *root)
