"""What a job starts from: nothing, or trained weights. Decides before files are merged.

A job may have a stage ``finetune`` with an empty ``from``, for those who have trained weights:

    stages.finetune.from     stages that run            model: auto
    ''                       pretrain                   revcol_own_images
    FILE.pth                 finetune                   the network of the file
"""

from __future__ import annotations

import os

from pipeline.checkpoint.weights_source import is_weights_file
from pipeline.config.job_queries import ORDER, TRAINING
from pipeline.config.yaml_tree.reading import Node

AUTO = "auto"
FROM_SCRATCH = "revcol_own_images"  # the model of `auto` without weights
USES_WEIGHTS = ("evaluate", "export")


def choose_start(tree: Node) -> tuple[Node, list[str]]:
    """Leave out the training stage that is not needed, and choose a model left to 'auto'.

    Returns:
        the tree, and notes for the user.
    """
    notes: list[str] = []
    initial = tree.get("stages", "finetune", "from")
    pretrain = tree.get("stages", "pretrain")
    outside = initial is not None and _is_outside(initial.value)
    # Only where a job has both stages is there something to choose.
    if pretrain is not None and pretrain.value is not None and initial is not None:
        # A stage that names `finetune` wants it, from scratch if need be.
        if not initial.value and not _is_used(tree, "finetune"):
            tree = tree.replaced(("stages", "finetune"), None)
        elif outside and not _is_used(tree, "pretrain"):
            tree = tree.replaced(("stages", "pretrain"), None)
            notes.append(
                f"{pretrain.origin}: stages.pretrain is left out: no stage uses its result"
            )
    return _with_model(_with_last_training(tree), outside), notes


def _is_outside(initial: object) -> bool:
    """True for weights that no stage of a job produces; a mistyped stage is none."""
    if not isinstance(initial, str) or initial in ORDER:
        return False
    return is_weights_file(initial) or os.path.isdir(os.path.expanduser(initial))


def _is_used(tree: Node, stage: str) -> bool:
    sources = [tree.get("stages", other, "from") for other in ORDER]
    return any(source is not None and source.value == stage for source in sources)


def _with_last_training(tree: Node) -> Node:
    """Evaluate and export the last training stage where the job does not say what."""
    trained = [stage for stage in TRAINING if _runs(tree, stage)]
    for stage in USES_WEIGHTS:
        # The schema's default is finetune, which a job need not have.
        if trained and _runs(tree, stage) and tree.get("stages", stage, "from") is None:
            node = Node(trained[-1], "chosen: the last training stage")
            tree = tree.replaced(("stages", stage, "from"), node)
    return tree


def _runs(tree: Node, stage: str) -> bool:
    node = tree.get("stages", stage)
    return node is not None and node.value is not None


def _with_model(tree: Node, trained_elsewhere: bool) -> Node:
    """Replace ``model: auto``, or ``base: auto`` in it; without a base, the weights give one."""
    # `--set model.drop_path=0.2` has made a mapping of the name.
    for path in (("model",), ("model", "base")):
        node = tree.get(*path)
        if node is not None and node.value == AUTO:
            chosen = Node(FROM_SCRATCH, "chosen: trained from scratch")
            tree = tree.replaced(path, None if trained_elsewhere else chosen)
    return tree
