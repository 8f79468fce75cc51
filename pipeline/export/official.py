"""Conversion to and from the parameter names and shapes of the published RevCol code."""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

from pipeline.blocks import registry
from pipeline.checkpoint.published_names import published_name, published_shape
from pipeline.errors import CheckpointError
from pipeline.model import Network, NetworkSpec
from pipeline.model.spec import PUBLISHED_STEM_STRIDE


def not_published(spec: NetworkSpec) -> str:
    """What the published code lacks of this network, in words; '' if it has such a network."""
    kinds = [registry.facts()[name] for name in dict.fromkeys(spec.blocks)]
    titles = [kind.title for kind in kinds if not kind.published_names]
    if titles:
        return f"{' and no '.join(titles)} blocks"
    return "" if spec.stem_stride == PUBLISHED_STEM_STRIDE else f"stem of stride {spec.stem_stride}"


def has_published_names(spec: NetworkSpec) -> bool:
    """True if the published code has such a network."""
    return not not_published(spec)


def names(model: Network) -> dict[str, str]:
    """Our name -> published name, for every parameter of ``model``."""
    parameters = dict(model.named_parameters())
    supervised = any(name.startswith("classifiers.1.") for name in parameters)
    simple = any(re.match(r"decoders\.\d\.norm\.", name) for name in parameters)
    return {
        name: published_name(
            name, blocks=model.spec.blocks, supervised=supervised, simple_decoder=simple
        )
        for name in parameters
    }


def to_published(model: Network, state: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """``model``'s parameters (or ``state``, by our names) under the published names and shapes."""
    state = dict(model.named_parameters()) if state is None else state
    converted = {}
    for ours, published in names(model).items():
        value = state[ours].detach()
        converted[published] = value.view(published_shape(published, tuple(value.shape)))
    return converted


def from_published(model: Network, published: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A published state dict under our names and shapes.

    Raises:
        CheckpointError: a name is missing or unexpected, or a shape does not fit.
    """
    expected = names(model)
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    missing = sorted(set(expected.values()) - set(published))
    unexpected = sorted(set(published) - set(expected.values()))
    if missing or unexpected:
        raise CheckpointError(
            f"published weights do not fit this model: {len(missing)} missing {missing[:5]}, "
            f"{len(unexpected)} left over {unexpected[:5]}",
            remedy="build the model with the same columns, depths, huge wiring, heads and number "
            "of classes",
        )
    converted = {}
    for ours, theirs in expected.items():
        # Shapes may differ by axes of length 1, sizes may not.
        if published[theirs].numel() != shapes[ours].numel():
            raise CheckpointError(
                f"{theirs} has shape {tuple(published[theirs].shape)}, "
                f"the model's {ours} {tuple(shapes[ours])}",
                remedy="build the model with the same channels and number of classes",
            )
        converted[ours] = published[theirs].reshape(shapes[ours])
    return converted


def load(model: Network, published: Mapping[str, Tensor]) -> None:
    """Load a published state dict into ``model``. Raises CheckpointError as ``from_published``."""
    model.load_state_dict(from_published(model, published), strict=True)
