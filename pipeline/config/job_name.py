"""Fills in ``{folder}`` in the name of a job: the name of the folder that its images come from.

    name: own_images-{folder}    data.root: /data/Flowers 2024/    ->    own_images-Flowers_2024

One job file serves many folders, and each of them gets a run directory of its own. Two folders of
the same name share one; the second is then refused if the first has been trained on, as any other
change of a dataset is.
"""

from __future__ import annotations

import re

from pipeline.config.schema.shrink import LONGEST_NAME
from pipeline.config.yaml_tree.reading import Node

FOLDER = "{folder}"
_NOT_IN_A_NAME = re.compile(r"[^\w.-]+")  # \w includes letters of every script
_SEPARATORS = "-_. "


def with_folder(tree: Node) -> Node:
    """The job with the name of its images' folder filled in. Its paths are absolute already."""
    name = tree.get("name")
    if name is None or not isinstance(name.value, str) or FOLDER not in name.value:
        return tree
    data = tree.get("data")
    datasets = data.entries().values() if data is not None else ()
    roots = [root.value for dataset in datasets if (root := dataset.get("root")) is not None]
    # Several datasets: each folder once, in their order.
    folders = dict.fromkeys(_last_part(root) for root in roots if isinstance(root, str))
    # Without a folder (a rehearsal reads none) the name is what is left: "own_images".
    filled = name.value.replace(FOLDER, "-".join(filter(None, folders))).strip(_SEPARATORS)
    return tree.replaced(("name",), Node(filled[:LONGEST_NAME], name.origin))


def _last_part(root: str) -> str:
    """The last part of a path or URL, with "_" for what does not belong in a folder's name."""
    return _NOT_IN_A_NAME.sub("_", root.rstrip("/").rpartition("/")[2]).strip(_SEPARATORS)
