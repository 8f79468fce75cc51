"""Networks are built by name, from the sizes that jobs use."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline.model import NetworkSpec, build, models
from pipeline.model.sizes import size_of

CONFIGS = Path(__file__).resolve().parents[2] / "configs" / "model"


def test_every_model_of_the_jobs_has_its_name_here() -> None:
    assert sorted(models()) == sorted(path.stem for path in CONFIGS.glob("*.yaml"))


@pytest.mark.parametrize("name", models())
def test_a_name_stands_for_the_values_of_its_file(name: str) -> None:
    values: dict[str, Any] = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())
    # Jobs choose some values from the images. Without a job, those have their defaults.
    given = {key: value for key, value in values.items() if value != "auto"}
    assert size_of(name) == given


def test_a_network_is_built_by_name_and_arguments_win() -> None:
    network = build("revcol_quickstart", num_classes=5, drop_path=0.25, activations="stored")
    expected = NetworkSpec(
        (16, 32, 64, 128),
        (1, 1, 1, 1),
        4,
        5,
        init="fan_in",
        layer_scale=1,
        drop_path=0.25,
        activations="stored",
    )
    assert network.spec == expected


def test_an_unknown_name_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match="revcol_tiny, revcol_small"):
        build("revcol_gigantic", num_classes=5)


def test_the_number_of_classes_must_be_named() -> None:
    with pytest.raises(TypeError, match="num_classes="):
        build("revcol_tiny", 10)  # type: ignore[call-overload]
