"""The networks of ``configs/model``, by their architecture."""

from __future__ import annotations

from collections.abc import Mapping

from pipeline.config.schema import ModelConfig
from pipeline.config.yaml_tree.reading import read_mapping
from pipeline.errors import ConfigError
from pipeline.shipped import CONFIGS

# Keys that decide names and shapes of the parameters.
ARCHITECTURE = ("channels", "depths", "columns", "huge", "block", "stem_stride")


def model_named(network: Mapping[str, object]) -> str:
    """The file of ``configs/model`` that describes this architecture; '' if none does.

    Args:
        network: fields of a network; those that it lacks have their default.
    """
    wanted = architecture(network)
    for path in sorted((CONFIGS / "model").glob("*.yaml")):
        try:
            if architecture(read_mapping(path).data()) == wanted:
                return path.stem
        except ConfigError:  # a file of a user's own in a checkout
            continue
    return ""


def architecture(network: Mapping[str, object]) -> dict[str, object]:
    """The values that decide names and shapes, in one form: lists, and defaults written out."""
    fields = ModelConfig.model_fields
    # A file in configs/model leaves out what has its default, such as the stem.
    values = {key: network.get(key, fields[key].default) for key in ARCHITECTURE}
    return {
        key: list(value) if isinstance(value, tuple) else value for key, value in values.items()
    }
