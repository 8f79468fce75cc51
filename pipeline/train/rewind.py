"""The return to a checkpoint after bad steps, and the report that ends a hopeless stage."""

from __future__ import annotations

import torch.distributed as dist

from pipeline.checkpoint.manifest import list_checkpoints
from pipeline.checkpoint.retention import delete_checkpoint
from pipeline.command import command
from pipeline.errors import StageError
from pipeline.train.checkpointing import restore
from pipeline.train.context import StageContext, StageLog
from pipeline.train.guard import Guard
from pipeline.train.setup import StageSetup, attach_recorder, continue_from


def rewind(
    context: StageContext,
    setup: StageSetup,
    log: StageLog,
    *,
    step: int,
    every: int,
    seconds: dict[str, float],
) -> int:
    """Return to a checkpoint from before the bad steps; the steps that it has done. Collective.

    No checkpoint is being written meanwhile.

    Args:
        step: the bad step (0-based) that asks for it.
        every: interval between regular checkpoints (steps). Others are not returned to: whether
            they exist depends on when the run was stopped, and the result must not.
        seconds: where the time since the last log went.

    Raises:
        StageError: there was a rewind too many, or no checkpoint to return to.
    """
    guard = setup.step.context.guard
    if guard.gives_up:
        raise _report(context, guard, step)
    # 1. The checkpoint. Those after it belong to a course that is given up.
    identity = context.identity(setup.spec)
    sharded = setup.step.context.state
    first_bad = min(guard.state.bad_steps)

    def usable(done: int) -> bool:
        return done % every == 0 and done <= first_bad

    restored = restore(context.checkpoints, sharded, identity, log, usable=usable)
    if restored is None:
        raise _report(context, guard, step)
    if context.dist_env.is_main:
        for newer, directory in list_checkpoints(context.checkpoints):
            if newer > restored.step:
                delete_checkpoint(directory)
    dist.barrier()
    # 2. The state of the loop, but for what the guard has learned.
    reason = guard.reason
    present = guard.state
    continue_from(restored.state, setup.step, setup.history)
    saved, guard.state = guard.state, present
    guard.rewound(saved, step, restored.step)
    # 3. Logs and charts return too: their readers drop what lies beyond the new start.
    if log.recorder is not None:
        log.recorder.close(seconds, step + 1)
    attach_recorder(context, log, restored.step)
    first, last = guard.state.left_out[-1]
    log(
        f"step {step + 1}: {reason}; returned to the checkpoint at step {restored.step}, and the "
        f"images of steps {first + 1} to {last + 1} are left out",
        "warning",
    )
    return restored.step


def _report(context: StageContext, guard: Guard, step: int) -> StageError:
    """Why the stage ends, what was tried, and where to look."""
    state = guard.state
    lines = [
        f"training does not recover: {len(state.bad_steps)} bad steps in the last "
        f"{guard.config.window}, the newest is step {step + 1}: {guard.reason}"
    ]
    for first, last in state.left_out:
        lines.append(f"    tried without the images of steps {first + 1} to {last + 1}")
    if state.losses:
        lines.append(f"    loss of the last good step: {state.losses[-1]:.4g}")
    look = "lower base_lr, or check the weights that the stage starts from"
    if state.captured:
        replay = command("replay", context.run_dir.path, "--step", state.captured[0] + 1)
        look = f"find the cause with `{replay}`; {look}"
    return StageError("\n".join(lines), place=f"stages.{context.stage}", remedy=look)
