"""Registry of optimizers: it needs no torch, and a malformed file is a clear error."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pipeline.config.schema import TrainConfig
from pipeline.optimizers import registry

ROOT = Path(__file__).resolve().parents[2]


def test_every_file_in_the_folder_is_an_optimizer() -> None:
    folder = ROOT / "pipeline" / "optimizers" / "kinds"
    names = sorted(path.stem for path in folder.glob("*.py") if path.stem != "__init__")
    assert list(registry.facts()) == names
    assert {"adamw", "lamb", "sgd"} <= set(names)


@pytest.mark.parametrize("name", registry.facts())
def test_moments_are_the_state_that_a_step_leaves_per_weight(name: str) -> None:
    """Checkpoints save ``MOMENTS`` and the step count: anything else would be lost."""
    config = TrainConfig(epochs=1, base_lr=1e-3, optimizer=name)
    kind = registry.kind(name)
    weight = torch.nn.Parameter(torch.ones(3))
    settings = {key: getattr(config, key) for key in registry.facts()[name].keys}
    optimizer = kind.optimizer([weight], lr=0.1, **settings)  # type: ignore[call-arg]
    weight.grad = torch.ones(3)
    optimizer.step()
    state = {key: value for key, value in optimizer.state[weight].items() if key != "step"}
    assert set(state) == set(kind.moments)
    assert {value.shape for value in state.values()} == {weight.shape}


def test_reading_the_facts_does_not_import_torch() -> None:
    code = (
        "import sys; from pipeline.optimizers import registry; "
        "assert registry.readers('eps'); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_an_unknown_optimizer_is_a_key_error() -> None:
    with pytest.raises(KeyError, match="adagrad"):
        registry.kind("adagrad")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("KEYS = ()\n", "has no docstring"),
        ('"""A."""\nMOMENTS = ()\n', "defines no KEYS"),
        ('"""A."""\nKEYS = (name,)\n', "KEYS must be a tuple of literals"),
    ],
)
def test_a_file_without_readable_facts_is_a_value_error_that_names_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, message: str
) -> None:
    (tmp_path / "broken.py").write_text(source)
    monkeypatch.setattr(registry, "_FOLDER", tmp_path)
    with pytest.raises(ValueError, match=message) as error:
        registry.facts.__wrapped__()
    assert "broken.py" in str(error.value)
