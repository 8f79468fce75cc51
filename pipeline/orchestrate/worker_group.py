"""The processes of a stage as one group of Ray actors: placement, ranks, start.

Example: a stage on 2 machines with 4 GPUs each is a placement group of 2 bundles {CPU: 4, GPU: 4}
on different machines, with four ``Worker`` actors in each. Ray promises no order, so every worker
says where it is, and the ranks are numbered afterwards: 0 to 3 on one machine, 4 to 7 on the other,
each machine in the order of its devices. The workers meet at a port of rank 0.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, TypeVar, cast

from pipeline import command
from pipeline.errors import Interrupted, StageError
from pipeline.orchestrate.failure_class import PROCESS, exit_line
from pipeline.orchestrate.machines import ID_LABEL, Machine
from pipeline.orchestrate.on_machine import call_on_machine
from pipeline.orchestrate.placement import GroupDied, Placement
from pipeline.orchestrate.user_errors import RERUN
from pipeline.orchestrate.worker import Outcome, StageFn, Worker, WorkerPlace
from pipeline.runtime import dist_env, environment
from pipeline.runtime.rank_link import Beat

if TYPE_CHECKING:
    from ray import ObjectRef
    from ray.actor import ActorHandle
    from ray.util.placement_group import PlacementGroup

Value = TypeVar("Value")

_LOOPBACK = "127.0.0.1"
_KILL_S = 5.0  # of a machine, to answer
_START_TIMEOUT_S = 120
_POLL_S = 0.2
SETTLE_S = 1.5  # between a first error and those that may tell its cause


class RemoteMethod(Protocol[Value]):
    """A method of an actor, as Ray offers it to the driver."""

    def remote(self, *arguments: object) -> ObjectRef[Value]: ...


class WorkerHandle(Protocol):
    """The driver's handle of a ``Worker`` actor."""

    warm_up: RemoteMethod[None]
    place: RemoteMethod[WorkerPlace]
    free_port: RemoteMethod[int]
    run: RemoteMethod[Outcome]
    request_stop: RemoteMethod[None]
    last_beat: RemoteMethod[Beat]
    stack: RemoteMethod[list[str]]


@dataclass(frozen=True, kw_only=True)
class RankedWorker:
    """One rank of a group: its worker and where it is. ``machine`` is None in our own Ray."""

    worker: WorkerHandle
    place: WorkerPlace
    machine: Machine | None

    @property
    def node(self) -> str | None:
        """ID of its machine in Ray; None in our own Ray, which is on this machine."""
        return None if self.machine is None else self.place.machine


@dataclass(frozen=True, kw_only=True)
class WorkerGroup:
    """The workers of a stage, in the order of their ranks."""

    placement: Placement
    members: list[RankedWorker]

    @property
    def machines(self) -> list[Machine]:
        """The machines of the group, in the order of their ranks; [] in our own Ray."""
        return list(dict.fromkeys(m.machine for m in self.members if m.machine is not None))

    def name(self, rank: int) -> str:
        """For messages: "rank 3 on gpu-17 (10.0.0.17)"; in our own Ray "rank 3"."""
        machine = self.members[rank].machine
        return f"rank {rank}" if machine is None else f"rank {rank} on {machine.name}"

    def describe(self) -> str:
        """For messages: "ranks 0-3 on n1 (10.77.0.1), ranks 4-7 on n2 (10.77.0.2)"."""
        texts = []
        for machine in self.machines:
            ranks = [r for r, member in enumerate(self.members) if member.machine == machine]
            first, last = ranks[0], ranks[-1]
            span = f"rank {first}" if first == last else f"ranks {first}-{last}"
            texts.append(f"{span} on {machine.name}")
        return ", ".join(texts)

    def kill(self) -> None:
        """End the processes by SIGKILL: a stopped one heeds nothing else, not even Ray."""
        for member in self.members:
            call_on_machine(member.node, kill_worker, member.place.pid, timeout_s=_KILL_S)

    def environment(self, rank: int) -> dict[str, str]:
        """Variables of one rank that follow from its place."""
        placement = self.placement
        place = self.members[rank].place
        neighbours = [
            other for other, m in enumerate(self.members) if m.place.machine == place.machine
        ]
        local_size = len(neighbours)
        threads = placement.threads or max(1, place.cores // local_size)
        variables = environment.training_process(placement.device, threads)
        variables |= environment.rank_of_group(
            rank, len(self.members), neighbours.index(rank), local_size
        )
        # Remedies in errors of a worker name the command that the user typed at the driver.
        variables |= {command.VARIABLE: command.program()}
        if self.members[rank].machine is None:
            # All processes are on this machine: no library listens on an outward address.
            return variables | environment.collectives("lo")
        if place.device is not None:
            variables |= {dist_env.DEVICE: str(place.device)}
        return variables | environment.collectives(placement.interface) | {**placement.variables}


def kill_worker(pid: int) -> None:
    """SIGKILL to a worker of this machine, if it is still there."""
    with contextlib.suppress(OSError):
        # Another process may have its ID by now. Ray gives its workers names such as "ray::run".
        if Path(f"/proc/{pid}/cmdline").read_bytes().startswith(b"ray::"):
            os.kill(pid, signal.SIGKILL)


@contextlib.contextmanager
def worker_group(
    placement: Placement,
    check: Callable[[], None],
    check_start: Callable[[], None],
    ready: Sequence[WorkerHandle] = (),
) -> Iterator[WorkerGroup]:
    """Create the workers of a group. On exit they are killed, whatever they are doing.

    Args:
        ready: workers that stood by; they become the group.
        check: called on exit; raises RayLost if Ray is lost.
        check_start: called several times per second; may raise to cancel the start.

    Raises:
        StageError: the machine has too few GPUs or CPU cores.
        Interrupted: the machines of a cluster have no room within the time.
        GroupDied: a process died before it could say where it is.
    """
    import ray
    from ray.util.placement_group import remove_placement_group

    workers = list(ready)
    members: list[RankedWorker] = []
    group = None if ready else _reserve(placement)
    try:
        if group is not None:
            if not _wait_for(partial(group.wait, _POLL_S), placement.wait_s, check_start):
                raise _no_room(placement)
            workers += _create(placement, group)
        members += _ranked(placement, workers, check_start)
        yield WorkerGroup(placement=placement, members=members)
    finally:
        # A lost Ray raises here: no worker is left, and the calls below would never return.
        check()
        # Kill, do not ask: the peers of a failed rank hang in a collective operation.
        for worker in workers:
            ray.kill(cast("ActorHandle[Worker]", worker), no_restart=True)
        for member in members:
            if member.machine is None:
                kill_worker(member.place.pid)
        if group is not None:
            remove_placement_group(group)


def _reserve(placement: Placement) -> PlacementGroup:
    """Ask Ray for room: one bundle per machine, on different machines."""
    from ray.util.placement_group import placement_group

    share = float(placement.processes // placement.machines)
    bundle = {"CPU": share, "GPU": share} if placement.device == "cuda" else {"CPU": share}
    selector = None
    if placement.candidates is not None:
        ids = ",".join(machine.id for machine in placement.candidates)
        selector = [{ID_LABEL: f"in({ids})"}] * placement.machines
    group: PlacementGroup = placement_group(
        [bundle] * placement.machines, strategy="STRICT_SPREAD", bundle_label_selector=selector
    )
    return group


def _no_room(placement: Placement) -> StageError | Interrupted:
    resource = "GPUs" if placement.device == "cuda" else "CPU cores"
    if placement.candidates is None:
        return StageError(
            f"not enough {resource} for {placement.processes} processes",
            place=placement.stage,
            remedy="lower cluster.processes",
        )
    names = ", ".join(machine.name for machine in placement.candidates)
    return Interrupted(
        f"no free {resource} for {placement.processes} processes on {placement.machines} of these "
        f"machines within {placement.wait_s:g} s (cluster.wait): {names}",
        place=placement.stage,
        remedy=f"when they are free, {RERUN}",
    )


def _create(placement: Placement, group: PlacementGroup) -> list[WorkerHandle]:
    """Create the workers, machine by machine."""
    import ray
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    share = placement.processes // placement.machines
    workers = []
    for index in range(placement.processes):
        # One thread runs the stage, another one receives the stop request meanwhile.
        actor = ray.remote(Worker).options(
            num_cpus=1,
            num_gpus=1 if placement.device == "cuda" else 0,
            max_concurrency=4,
            scheduling_strategy=PlacementGroupSchedulingStrategy(
                group, placement_group_bundle_index=index // share
            ),
        )
        workers.append(cast(WorkerHandle, actor.remote()))
    return workers


def _ranked(
    placement: Placement, workers: Sequence[WorkerHandle], check: Callable[[], None]
) -> list[RankedWorker]:
    """Ask the workers where they are, and put them in the order of their ranks."""
    import ray

    answers = [worker.place.remote() for worker in workers]
    waiting = list(answers)

    def all_answered() -> bool:
        nonlocal waiting
        _, waiting = ray.wait(waiting, num_returns=len(waiting), timeout=_POLL_S)
        return not waiting

    _wait_for(all_answered, _START_TIMEOUT_S, check)
    known = {machine.id: machine for machine in placement.candidates or ()}
    members = []
    for index, (worker, answer) in enumerate(zip(workers, answers, strict=True)):
        try:
            place = ray.get(answer, timeout=0)
        except ray.exceptions.RayError as error:
            raise died_at_start(placement, f"process {index + 1}", error) from None
        members.append(RankedWorker(worker=worker, place=place, machine=known.get(place.machine)))
    order = [machine.id for machine in placement.candidates or ()]
    # Stable: on a CPU, the processes of a machine stay in the order of their creation. In our own
    # Ray LOCAL_RANK chooses the device.
    return sorted(
        members,
        key=lambda member: (
            (order.index(member.place.machine), member.place.device or 0) if order else ()
        ),
    )


def start(
    group: WorkerGroup, stage_fn: StageFn, generation: int, check: Callable[[], None]
) -> dict[ObjectRef[Outcome], int]:
    """Start the stage on every worker; returns the rank of each future outcome.

    Args:
        check: called several times per second; may raise to cancel the start.

    Raises:
        GroupDied: the process of rank 0 died before it could name a port.
    """
    import ray

    placement = group.placement
    first = group.members[0]
    address = _LOOPBACK if first.machine is None else first.machine.address
    answer = first.worker.free_port.remote(address)
    _wait_for(lambda: bool(ray.wait([answer], timeout=_POLL_S)[0]), _START_TIMEOUT_S, check)
    try:
        port = ray.get(answer, timeout=0)
    except ray.exceptions.RayError as error:
        time.sleep(SETTLE_S)
        raise died_at_start(placement, group.name(0), error) from None
    rendezvous = {
        "MASTER_ADDR": address,
        "MASTER_PORT": str(port),
        dist_env.GENERATION: str(generation),
    }
    return {
        member.worker.run.remote(
            stage_fn, placement.log(rank), placement.fence, rendezvous | group.environment(rank)
        ): rank
        for rank, member in enumerate(group.members)
    }


def died_at_start(placement: Placement, process: str, error: Exception) -> GroupDied:
    """The error of a process that died before it had a log."""
    return GroupDied(
        f"{process} of {placement.processes} died at its start: {exit_line(error)}",
        place=placement.stage,
        remedy=f"if the memory of its machine is full, free some, then {RERUN}",
        kind=PROCESS,
        lost=True,
    )


def _wait_for(ready: Callable[[], bool], timeout_s: float, check: Callable[[], None]) -> bool:
    """Call ``ready``, which may block for ``_POLL_S``, until it is true or the time is over."""
    deadline = time.monotonic() + timeout_s
    while not ready():
        check()
        if time.monotonic() > deadline:
            return False
    return True
