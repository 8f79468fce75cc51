"""Names and shapes of the published RevCol code, exactly both ways."""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor, nn

from pipeline.blocks import registry
from pipeline.errors import CheckpointError

# (ours, published), applied in order; groups keep the numbers.
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
_POINTWISE = re.compile(r"decoder_blocks\.\d\.(proj_layers\.\d\.0|projback\.\d)\.weight$")
_ALPHA = re.compile(r"subnet\d+\.alpha\d$")


def published_name(name: str, *, supervised: bool, simple_decoder: bool) -> str:
    """Our parameter's name -> the published one."""
    head = r"cls_blocks.\1" if supervised else "cls"
    rules = (
        *_RULES,
        (r"classifiers\.(\d)\.norm\.", head + r".classifier.0."),
        (r"classifiers\.(\d)\.linear\.", head + r".classifier.1."),
        (
            r"decoders\.(\d)\.project\.",
            r"decoder_blocks.\1.projback." + ("1." if simple_decoder else "0."),
        ),
    )
    for pattern, replacement in rules:
        renamed, count = re.subn("^" + pattern, replacement, name)
        if count:
            if ".blocks." in renamed or ".normal_layers." in renamed:
                for ours, published in registry.facts()["convnext"].published_names.items():
                    renamed = renamed.replace(ours, published)
            return renamed
    raise CheckpointError(
        f"parameter {name!r} has no published name",
        remedy="only published architectures can be exported",
    )


def names(model: nn.Module) -> dict[str, str]:
    """Our name -> published name, for every parameter of ``model``."""
    parameters = dict(model.named_parameters())
    supervised = any(name.startswith("classifiers.1.") for name in parameters)
    simple = any(re.match(r"decoders\.\d\.norm\.", name) for name in parameters)
    return {
        name: published_name(name, supervised=supervised, simple_decoder=simple)
        for name in parameters
    }


def to_published(model: nn.Module, state: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """``model``'s parameters (or ``state``, by our names) under the published names and shapes."""
    state = dict(model.named_parameters()) if state is None else state
    result = {}
    for ours, published in names(model).items():
        value = state[ours].detach()
        if _ALPHA.search(published):
            value = value.view(1, -1, 1, 1)
        elif value.dim() == 2 and _POINTWISE.search(published):
            value = value.view(*value.shape, 1, 1)
        result[published] = value
    return result


def from_published(model: nn.Module, published: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A published state dict under our names and shapes. Raises CheckpointError on any missing or left-over name or shape."""
    wanted = names(model)
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    missing = sorted(set(wanted.values()) - set(published))
    extra = sorted(set(published) - set(wanted.values()))
    if missing or extra:
        raise CheckpointError(
            f"published weights do not fit this model: {len(missing)} missing {missing[:5]}, "
            f"{len(extra)} left over {extra[:5]}",
            remedy="build the model with the same columns, depths, huge wiring, heads and number of classes",
        )
    result = {}
    for ours, theirs in wanted.items():
        if published[theirs].numel() != shapes[ours].numel():
            raise CheckpointError(
                f"{theirs} has shape {tuple(published[theirs].shape)}, the model's {ours} {tuple(shapes[ours])}",
                remedy="build the model with the same channels and number of classes",
            )
        result[ours] = published[theirs].reshape(shapes[ours])
    return result


def load(model: nn.Module, published: Mapping[str, Tensor]) -> None:
    """Load a published state dict into ``model``, exactly; see ``from_published`` for what it raises."""
    model.load_state_dict(from_published(model, published), strict=True)
