"""A hub folder, and what its models should compute; shared by the tests of both libraries."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from pipeline.export.reload import Exported
from tests.data.small_datasets import jpeg
from tests.export.hub_models import exported, write_hub


@pytest.fixture(scope="session")
def model() -> Exported:
    return exported(huge=True, supervised=True)


@pytest.fixture(scope="session")
def folder(model: Exported, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder, with images, and the logits and maps that they should have."""
    folder = write_hub(tmp_path_factory.mktemp("hub") / "hub", model)
    images = torch.randn(3, 3, 64, 96, generator=torch.Generator().manual_seed(1))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.no_grad():
        maps = [level.permute(0, 3, 1, 2) for level in model.network.features(images)]
        logits = model.network(images).logits[-1]
    torch.set_num_threads(threads)
    expected = {f"map{i}": level.contiguous() for i, level in enumerate(maps)}
    save_file(
        expected | {"images": images, "logits": logits}, folder.parent / "expected.safetensors"
    )
    (folder.parent / "cat.jpg").write_bytes(jpeg(3, 100, 90))
    return folder
