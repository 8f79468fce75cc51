"""Kinds of blocks. A new one is a file that defines ``KIND`` and an entry here."""

from __future__ import annotations

from pipeline.model.blocks import c2f, convnext, transformer
from pipeline.model.blocks.kind import BlockKind

BLOCKS: dict[str, BlockKind] = {"convnext": convnext.KIND, "c2f": c2f.KIND, "transformer": transformer.KIND}
