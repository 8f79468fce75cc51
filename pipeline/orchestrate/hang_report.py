"""What the processes of a group that hangs are doing, and which of them is to blame.

Each process is asked for the calls of its main thread. One that does not answer is looked at from
outside, on its machine. Most ranks wait in the same collective operation; the others are named.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from pipeline.orchestrate.failure_class import HANG
from pipeline.orchestrate.heartbeats import Hang
from pipeline.orchestrate.on_machine import call_on_machine
from pipeline.orchestrate.placement import GroupDied
from pipeline.orchestrate.worker_group import WorkerGroup

_ANSWER_S = 5.0
_LOOK_S = 10.0  # of a look from outside, the start of its task included
_SHOWN_CALLS = 8  # the innermost ones
_STATES = {"T": "stopped by a signal", "t": "stopped by a debugger", "D": "waiting for a device"}

_RUNS_METHOD = "actor_method_executor"
_WAITS = "torch/distributed/"  # in a collective operation

Stack = tuple[str, ...]  # calls, the innermost one first; of a look from outside, free text


def hang_error(group: WorkerGroup, hang: Hang) -> GroupDied:
    """The error that ends a group which hangs, with the calls of all ranks."""
    answered = _stacks(group, hang)
    silent = [rank for rank in hang.beats if rank not in answered]
    stacks = answered | {rank: _look_from_outside(group, rank) for rank in silent}
    blamed = _blamed(hang, answered, silent)
    names = ", ".join(map(group.name, blamed))
    lines = [
        f"{names} ({HANG.name}): no progress for {hang.silent_s:.0f} s (limit {hang.limit_s:.0f} s)"
    ]
    for stack, ranks in _by_stack(stacks).items():
        lines.append(f"  {_positions(ranks, hang)}:")
        lines += [f"  | {call}" for call in stack[:_SHOWN_CALLS]]
    machines = {group.members[rank].machine for rank in blamed}
    return GroupDied(
        "\n".join(lines),
        place=group.placement.stage,
        remedy=f"{HANG.remedy}; its whole output: {group.placement.log(blamed[0])}",
        kind=HANG,
        lost=True,
        machine=machines.pop() if len(machines) == 1 else None,
    )


def _stacks(group: WorkerGroup, hang: Hang) -> dict[int, Stack]:
    """The calls of the ranks that answer."""
    import ray

    asked = {group.members[rank].worker.stack.remote(): rank for rank in hang.beats}
    ended, _ = ray.wait(list(asked), num_returns=len(asked), timeout=_ANSWER_S)
    stacks: dict[int, Stack] = {}
    for ref in ended:
        with contextlib.suppress(ray.exceptions.RayError):
            stacks[asked[ref]] = tuple(ray.get(ref))
    return stacks


def _look_from_outside(group: WorkerGroup, rank: int) -> Stack:
    """What the machine of a rank knows about its process."""
    member = group.members[rank]
    seen = call_on_machine(member.node, look_at, member.place.pid, timeout_s=_LOOK_S)
    return ("its machine does not answer",) if seen is None else seen


def look_at(pid: int) -> Stack:
    """State and calls of a process of this machine, without its help."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return ("its process has ended",)
    letter = next(line.split()[1] for line in status.splitlines() if line.startswith("State:"))
    lines = [f"process {pid} is {_STATES.get(letter, f'in state {letter}')}"]
    spy = shutil.which("py-spy", path=f"{Path(sys.executable).parent}:{os.environ.get('PATH', '')}")
    if spy is not None:  # a part of Ray's dashboard
        # Without a pause of the process: a stopped one could not be paused.
        command = [spy, "dump", "--nonblocking", "--pid", str(pid)]
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            done = subprocess.run(command, capture_output=True, text=True, timeout=5, check=True)
            lines += _calls_of_stage(done.stdout)
    return tuple(lines)


def _calls_of_stage(dump: str) -> list[str]:
    """The calls of the thread that runs the stage; [] if the dump does not have them."""
    # Ray runs the methods of its workers in threads of its own, which all begin with this function.
    threads = (thread for thread in dump.split("\nThread ") if _RUNS_METHOD in thread)
    return [line.strip() for line in next(threads, "").splitlines()[1:] if line.strip()]


def _blamed(hang: Hang, answered: Mapping[int, Stack], silent: Sequence[int]) -> list[int]:
    """The ranks that the others wait for, as far as one can tell."""
    if silent:
        return list(silent)
    # 1. Those behind: the others have done more steps.
    steps = {rank: beat.step for rank, beat in hang.beats.items()}
    behind = [rank for rank, step in steps.items() if step < max(steps.values())]
    if behind:
        return behind
    # 2. Those that do not wait in a collective operation, as the others do.
    busy = [rank for rank, stack in answered.items() if _WAITS not in "".join(stack[:1])]
    if 0 < len(busy) < len(answered):
        return busy
    # 3. Those that are elsewhere: the others are in the same function.
    places = Counter(stack[:1] for stack in answered.values())
    usual, count = places.most_common(1)[0]
    elsewhere = [rank for rank, stack in answered.items() if stack[:1] != usual]
    if elsewhere and count > len(answered) / 2:
        return elsewhere
    return list(hang.beats)


def _by_stack(stacks: Mapping[int, Stack]) -> dict[Stack, list[int]]:
    ranks: dict[Stack, list[int]] = {}
    for rank in sorted(stacks):
        ranks.setdefault(stacks[rank], []).append(rank)
    return ranks


def _positions(ranks: Sequence[int], hang: Hang) -> str:
    """For example "ranks 0, 2 (step 14, step)"."""
    places = sorted({f"step {hang.beats[rank].step}, {hang.beats[rank].phase}" for rank in ranks})
    word = "rank" if len(ranks) == 1 else "ranks"
    return f"{word} {', '.join(map(str, ranks))} ({'; '.join(places)})"
