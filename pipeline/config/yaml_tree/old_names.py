"""Replaces the names that keys and values had in earlier releases (``schema.renamed``).

Worked example: ``stages: {pretrain: {lr: 1e-3, augment: {erasing: 0}}}`` becomes
``stages: {pretrain: {base_lr: 1e-3, augment: {random_erasing: 0}}}`` with one problem per old name,
each at its own line. Whoever reads a user's file raises the problems; whoever reads a file of an
old run ignores them.
"""

from __future__ import annotations

from typing import Any

from pipeline.config.schema.renamed import RENAMED_VALUES
from pipeline.config.schema_text.describe import SchemaKey, root
from pipeline.config.yaml_tree.diagnostics import Problem
from pipeline.config.yaml_tree.reading import Node


def replace_old_names(node: Node, key: SchemaKey, problems: list[Problem]) -> Node:
    """Replace old names in the value of ``key`` and everything below it.

    Adds one problem per old name. If a mapping has both the old and the new name, the new one wins.
    """
    # Lists need no visit: no key of the schema holds a list of mappings.
    if not isinstance(node.value, dict):
        return _replace_old_value(node, key, problems)
    entries: dict[str, Node] = {}
    for name, below in node.entries().items():
        new = key.new_name(name)
        if new is not None:
            cause = f"'{name}' was renamed to '{new}'"
            problems.append(Problem(below.origin, cause, f"write {new} instead of {name}"))
            if new in node.entries():
                continue
            name = new
        child = key.child(name)  # under the new name, so that old names inside are found too
        # An unknown key stays as it is: the schema reports it later, with a suggestion.
        entries[name] = replace_old_names(below, child, problems) if child is not None else below
    return Node(entries, node.origin)


def migrate_renamed(resolved: dict[str, Any]) -> dict[str, Any]:
    """A resolved job as an earlier release wrote it, with the names of this release.

    Example: {"stages": {"pretrain": {"on_mismatch": "redo"}}} -> {... {"on_mismatch": "retry"}}.
    """
    migrated: dict[str, Any] = replace_old_names(Node.of(resolved), root(), []).data()
    return migrated


def _replace_old_value(node: Node, key: SchemaKey, problems: list[Problem]) -> Node:
    name = key.path[-1] if key.path else ""
    old = node.value
    is_scalar = isinstance(old, str | float | int)
    new = RENAMED_VALUES.get(name, {}).get(old) if is_scalar else None
    if new is None:
        return node
    cause = f"{key.dotted}: '{old}' was renamed to '{new}'"
    problems.append(Problem(node.origin, cause, f"write {name}: {new}"))
    return Node(new, node.origin, node.plain)
