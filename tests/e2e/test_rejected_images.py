"""Too many rejected images, as a user meets them: the remedies of the error work (D10)."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.e2e.job_runs import finish, run, start, state
from tests.prepare.source_folders import class_tars, images, write_tar

pytestmark = pytest.mark.slow
JOB = """
name: small
model: {{channels: [8, 16, 24, 32], depths: [1, 1, 2, 1], columns: 4}}
data: {{root: {root}, min_side: 36}}
stages: {{prepare: {{}}}}
"""


def test_the_remedies_of_a_refused_preparation_continue_it(tmp_path: Path) -> None:
    source = class_tars(tmp_path / "images", validation=0)
    write_tar(source / "c1.tar", {**images(1, 20), "page.png": b"<html>"})
    job = tmp_path / "small.yaml"
    job.write_text(JOB.format(root=source))
    code, out = finish(start(job))
    assert code == 2, out
    assert "raise max_rejected (now 0.01) or lower min_side (now 36)" in " ".join(out.split())
    quarantine = tmp_path / "runs/small/stages/prepare/images/quarantine"
    entries = [json.loads(line) for line in (quarantine / "rejected.jsonl").open()]
    assert len(entries) == 61
    assert all((quarantine / entry["file"]).is_file() for entry in entries)
    # Both remedies, one after the other.
    code, out = finish(start(job, "--set", "data.min_side=16"))
    assert code == 2, out
    assert "images: 1 of 1 units were read by an earlier call" in out
    out = run(job, "--set", "data.min_side=16", "--set", "data.max_rejected=0.05")
    assert "resuming with data.images.max_rejected: 0.01 -> 0.05" in " ".join(out.split())
    assert "images: 1 of 1 units were read by an earlier call" in out
    assert state(job, "prepare") == "done"
