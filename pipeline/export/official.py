"""Conversion to and from the parameter names and shapes of the published RevCol code."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from torch import Tensor

from pipeline.blocks import registry
from pipeline.errors import CheckpointError
from pipeline.model import Network, NetworkSpec
from pipeline.model.spec import PUBLISHED_STEM_STRIDE

# (our pattern, published name). The first pattern that matches the start of a name applies; the
# rest of the name stays. Example:
#   columns.3.levels.0.down.norm.bias -> subnet3.level0.fusion.down.1.bias
_RULES: tuple[tuple[str, str], ...] = (
    (r"stem\.conv\.", r"stem.0."),
    (r"stem\.norm\.", r"stem.1."),
    (r"columns\.(\d+)\.levels\.(\d)\.alpha", r"subnet\1.alpha\2"),
    (r"columns\.(\d+)\.levels\.(\d)\.blocks\.", r"subnet\1.level\2.blocks."),
    (r"columns\.(\d+)\.levels\.(\d)\.down\.conv\.", r"subnet\1.level\2.fusion.down.0."),
    (r"columns\.(\d+)\.levels\.(\d)\.down\.norm\.", r"subnet\1.level\2.fusion.down.1."),
    (
        r"columns\.(\d+)\.levels\.(\d)\.up\.linear\.",
        r"subnet\1.level\2.fusion.up.channel_reschedule.0.",
    ),
    (
        r"columns\.(\d+)\.levels\.(\d)\.up\.norm\.",
        r"subnet\1.level\2.fusion.up.channel_reschedule.1.",
    ),
    (
        r"columns\.(\d+)\.levels\.(\d)\.up_top\.linear\.",
        r"subnet\1.level\2.fusion.up2.channel_reschedule.0.",
    ),
    (
        r"columns\.(\d+)\.levels\.(\d)\.up_top\.norm\.",
        r"subnet\1.level\2.fusion.up2.channel_reschedule.1.",
    ),
    (r"decoders\.(\d)\.stages\.(\d)\.block\.", r"decoder_blocks.\1.normal_layers.\2.0."),
    (r"decoders\.(\d)\.stages\.(\d)\.linear\.", r"decoder_blocks.\1.proj_layers.\2.0."),
    (r"decoders\.(\d)\.stages\.(\d)\.norm\.", r"decoder_blocks.\1.proj_layers.\2.1."),
    (r"decoders\.(\d)\.norm\.", r"decoder_blocks.\1.projback.0."),
)
# Ours are linear layers and vectors; the published code has 1x1 convolutions and (1, C, 1, 1).
_POINTWISE = re.compile(r"decoder_blocks\.\d\.(proj_layers\.\d\.0|projback\.\d)\.weight$")
_ALPHA = re.compile(r"subnet\d+\.alpha\d$")


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


def published_name(
    name: str, *, blocks: Sequence[str], supervised: bool, simple_decoder: bool
) -> str:
    """The published name of our parameter ``name``.

    Args:
        blocks: block kind of each of the four levels.
        supervised: the network has several classifiers, which the published code names otherwise.
        simple_decoder: the decoders have a norm before their projection.

    Raises:
        CheckpointError: there is none.
    """
    # Some published names depend on the heads of the network.
    head = r"cls_blocks.\1" if supervised else "cls"
    projection = r"decoder_blocks.\1.projback." + ("1." if simple_decoder else "0.")
    rules = (
        *_RULES,
        (r"classifiers\.(\d)\.norm\.", head + r".classifier.0."),
        (r"classifiers\.(\d)\.linear\.", head + r".classifier.1."),
        (r"decoders\.(\d)\.project\.", projection),
    )
    for pattern, replacement in rules:
        renamed, count = re.subn("^" + pattern, replacement, name)
        if count:
            return _rename_inside_block(name, renamed, blocks)
    raise CheckpointError(
        f"parameter {name!r} has no published name",
        remedy="export without revcol.pth: only published architectures have these names",
    )


def _rename_inside_block(name: str, renamed: str, blocks: Sequence[str]) -> str:
    """Give the parts of a block their published names, which the registry has for its kind."""
    level = re.match(r"columns\.\d+\.levels\.(\d)\.blocks\.", name)
    if level is not None:
        kind = blocks[int(level[1])]
    elif re.match(r"decoders\.\d\.stages\.\d\.block\.", name):
        kind = "convnext"  # decoders have ConvNeXt blocks, whatever the columns have
    else:
        return renamed
    for ours, published in registry.facts()[kind].published_names.items():
        renamed = renamed.replace(ours, published)
    return renamed


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
        if _ALPHA.search(published):
            value = value.view(1, -1, 1, 1)
        elif value.dim() == 2 and _POINTWISE.search(published):
            value = value.view(*value.shape, 1, 1)
        converted[published] = value
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
