"""timm's own tests, from the source distribution of the installed version, pass on our network."""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from pipeline.export.hub.bundle import bundle
from tests.cluster.debian import CACHE, unavailable
from tests.export.hub_models import ROOT

# Loaded by pytest before timm's tests list the models that are registered.
PLUGIN = """
from pipeline.runtime.torchvision_import import import_torchvision
import_torchvision()
import modeling_revcol
import torch
torch.set_num_threads(1)
"""
# Their parameters are chosen at import: all models; those with intermediates by their module.
# TorchScript is left out: the network has annotations that it does not know.
CHOSEN = "revcol_tiny and not torchscript"


@pytest.fixture(scope="module")
def timm_tests() -> Path:
    """timm's ``tests/test_models.py``, from the index that pip uses."""
    version = importlib.metadata.version("timm")
    folder = CACHE / f"timm-{version}"
    if not folder.is_dir():
        CACHE.mkdir(parents=True, exist_ok=True)
        # pip builds the metadata of what it downloads, and needs timm's build tool for that.
        options = ["--no-deps", "--no-binary", "timm", "-q"]
        command = [sys.executable, "-m", "pip", "download", f"timm=={version}", *options]
        done = subprocess.run(
            [*command, "-d", str(CACHE)], capture_output=True, text=True, check=False
        )
        archive = CACHE / f"timm-{version}.tar.gz"
        if done.returncode != 0 or not archive.is_file():
            unavailable(f"the sources of timm cannot be downloaded: {done.stderr[-1000:]}")
        with tarfile.open(archive) as tar:
            tar.extractall(CACHE, filter="data")
    return folder / "tests" / "test_models.py"


def test_the_tests_of_timm_pass_on_our_network(timm_tests: Path, tmp_path: Path) -> None:
    (tmp_path / "modeling_revcol.py").write_text(bundle())
    (tmp_path / "revcol_plugin.py").write_text(PLUGIN)
    # The models whose intermediates are tested are listed by module.
    text = timm_tests.read_text().replace(
        "FEAT_INTER_FILTERS = [", "FEAT_INTER_FILTERS = ['modeling_revcol',", 1
    )
    copy = tmp_path / "test_models.py"
    copy.write_text(text)
    paths = os.pathsep.join([str(tmp_path), str(ROOT)])
    options = ["-q", "-p", "revcol_plugin", "-p", "no:cacheprovider", "-n0", "-W", "ignore"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", str(copy), *options, "-k", CHOSEN, "--rootdir", "."],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-5000:]
    passed = int(done.stdout.split(" passed")[0].split()[-1])
    assert passed >= 6, done.stdout[-2000:]
