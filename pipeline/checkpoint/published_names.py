"""Parameter names of the published RevCol code, both ways. Needs no torch.

ours       columns.3.levels.0.down.norm.bias
published  subnet3.level0.fusion.down.1.bias
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from pipeline.blocks import registry
from pipeline.errors import CheckpointError

# (start of our name, start of the published one). {a} and {b} stand for numbers; the rest of a name
# stays. The first pair that matches applies, in both directions.
_RULES: tuple[tuple[str, str], ...] = (
    ("stem.conv.", "stem.0."),
    ("stem.norm.", "stem.1."),
    ("columns.{a}.levels.{b}.alpha", "subnet{a}.alpha{b}"),
    ("columns.{a}.levels.{b}.blocks.", "subnet{a}.level{b}.blocks."),
    ("columns.{a}.levels.{b}.down.conv.", "subnet{a}.level{b}.fusion.down.0."),
    ("columns.{a}.levels.{b}.down.norm.", "subnet{a}.level{b}.fusion.down.1."),
    ("columns.{a}.levels.{b}.up.linear.", "subnet{a}.level{b}.fusion.up.channel_reschedule.0."),
    ("columns.{a}.levels.{b}.up.norm.", "subnet{a}.level{b}.fusion.up.channel_reschedule.1."),
    (
        "columns.{a}.levels.{b}.up_top.linear.",
        "subnet{a}.level{b}.fusion.up2.channel_reschedule.0.",
    ),
    ("columns.{a}.levels.{b}.up_top.norm.", "subnet{a}.level{b}.fusion.up2.channel_reschedule.1."),
    ("decoders.{a}.stages.{b}.block.", "decoder_blocks.{a}.normal_layers.{b}.0."),
    ("decoders.{a}.stages.{b}.linear.", "decoder_blocks.{a}.proj_layers.{b}.0."),
    ("decoders.{a}.stages.{b}.norm.", "decoder_blocks.{a}.proj_layers.{b}.1."),
)
# With several classifiers, and with a single one.
_CLASSIFIERS = (
    ("classifiers.{a}.norm.", "cls_blocks.{a}.classifier.0."),
    ("classifiers.{a}.linear.", "cls_blocks.{a}.classifier.1."),
)
_CLASSIFIER = (
    ("classifiers.0.norm.", "cls.classifier.0."),
    ("classifiers.0.linear.", "cls.classifier.1."),
)
# The decoder of more than 1000 classes has a norm before its projection.
_SIMPLE_DECODER = (
    ("decoders.{a}.norm.", "decoder_blocks.{a}.projback.0."),
    ("decoders.{a}.project.", "decoder_blocks.{a}.projback.1."),
)
_DECODER = (("decoders.{a}.project.", "decoder_blocks.{a}.projback.0."),)

# Ours are linear layers and vectors; the published code has 1x1 convolutions and (1, C, 1, 1).
_POINTWISE = re.compile(r"decoder_blocks\.\d+\.(proj_layers\.\d+\.0|projback\.\d+)\.weight$")
_ALPHA = re.compile(r"subnet\d+\.alpha\d+$")

Shape = tuple[int, ...]


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
    rules = (
        *_RULES,
        *(_CLASSIFIERS if supervised else _CLASSIFIER),
        *(_SIMPLE_DECODER if simple_decoder else _DECODER),
    )
    renamed = _rename(name, [(ours, published) for ours, published in rules])
    if renamed is None:
        raise CheckpointError(
            f"parameter {name!r} has no published name",
            remedy="export without revcol.pth: only published architectures have these names",
        )
    # The parts of a block have names of their own, which the registry has for its kind.
    level = re.match(r"columns\.\d+\.levels\.(\d)\.blocks\.", name)
    kind = blocks[int(level[1])] if level is not None else "convnext"  # as in every decoder
    if level is not None or ".block." in name:
        for ours, published in registry.facts()[kind].published_names.items():
            renamed = renamed.replace(ours, published)
    return renamed


def are_published(names: Iterable[str]) -> bool:
    """True for the names of a network of the published code."""
    return any(name.startswith("subnet0.") for name in names)


def our_names(published: Iterable[str]) -> dict[str, str]:
    """Published name -> ours, for the names of a network of the published code.

    Names that the published code does not have stay as they are.
    """
    published = list(published)
    simple = any(re.match(r"decoder_blocks\.\d+\.projback\.1\.", name) for name in published)
    decoder = _SIMPLE_DECODER if simple else _DECODER
    rules = [(old, new) for new, old in (*_RULES, *_CLASSIFIERS, *_CLASSIFIER, *decoder)]
    parts = {
        old: new for kind in registry.facts().values() for new, old in kind.published_names.items()
    }
    names = {}
    for name in published:
        renamed = _rename(name, rules) or name
        if ".block" in renamed:
            for old, new in parts.items():
                renamed = renamed.replace(old, new)
        names[name] = renamed
    return names


def published_shape(name: str, shape: Shape) -> Shape:
    """The shape of a parameter in the published code, from our shape and its published name."""
    if _ALPHA.search(name):
        return (1, -1, 1, 1)
    return (*shape, 1, 1) if len(shape) == 2 and _POINTWISE.search(name) else shape


def our_shape(name: str, shape: Shape) -> Shape:
    """Our shape of a parameter, from its shape in a file and the name that it has there.

    timm, too, decays only parameters of more than one dimension, so that alpha has four in every
    file that is not ours.
    """
    if len(shape) == 4 and (_ALPHA.search(name) or name.endswith(".alpha")):
        return (shape[1],)
    return shape[:2] if len(shape) == 4 and _POINTWISE.search(name) else shape


def _rename(name: str, rules: Iterable[tuple[str, str]]) -> str | None:
    """The name with its start replaced by the first rule that matches; None without one."""
    for old, new in rules:
        pattern = re.escape(old).replace(r"\{a\}", r"(?P<a>\d+)").replace(r"\{b\}", r"(?P<b>\d+)")
        match = re.match(pattern, name)
        if match is not None:
            return new.format(**match.groupdict()) + name[match.end() :]
    return None
