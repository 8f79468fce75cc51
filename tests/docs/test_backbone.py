"""The examples of docs/backbone.md train with exactly reversible columns and with stored ones."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.docs.markdown import ROOT, Block, blocks

EXAMPLES = [block for block in blocks("python") if block.document.name == "backbone.md"]
EXACT = "save_memory=True"


def in_mode(block: Block, mode: str) -> str:
    """The code of an example; ``mode``: exact or stored."""
    assert block.text.count(EXACT) == 1
    return block.text if mode == "exact" else block.text.replace(EXACT, "save_memory=False")


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["exact", "stored"])
@pytest.mark.parametrize("block", EXAMPLES, ids=str)
def test_an_example_trains(block: Block, mode: str, tmp_path: Path) -> None:
    processes = 2 if "init_process_group" in block.text else 1
    code = "import torch; torch.manual_seed(0)\n" + in_mode(block, mode)
    # Every parameter that is trained must get a gradient.
    code += "\ntrained = [p for p in backbone.parameters() if p.requires_grad]"
    code += "\nassert all(torch.isfinite(p.grad).all() for p in trained)"
    running = [
        subprocess.Popen(
            [sys.executable, "-c", code],
            cwd=tmp_path,
            env=os.environ
            | {"RANK": str(rank), "WORLD_SIZE": str(processes), "PYTHONPATH": str(ROOT)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(processes)
    ]
    for process in running:
        _, errors = process.communicate()
        assert process.returncode == 0, errors[-3000:]
