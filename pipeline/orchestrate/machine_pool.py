"""The machines of a Ray cluster that a job may use: waiting for them, and their coming and going.

Example: ``nodes: 8, min_nodes: 4``, and a batch of 4096 images. One machine is lost. 4096 images
cannot be shared by 7 machines with 8 GPUs each, so the run continues on 4 of them; 3 are idle. When
the lost one returns, the run grows back to 8 machines, at its next checkpoint.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from pipeline.checkpoint.manifest import list_checkpoints
from pipeline.config import job_queries, machine
from pipeline.config.schema import ClusterConfig, Job
from pipeline.errors import ConfigError, Interrupted
from pipeline.orchestrate.machines import Machine, alive_machines, leaving_machines
from pipeline.orchestrate.placement import MachinesChanged, Placement
from pipeline.orchestrate.user_errors import RERUN
from pipeline.reporting import Log

EXPECTED = "PIPELINE_MACHINES"  # host names that a scheduler has assigned, separated by spaces
_POLL_S = 0.5
_LOOK_S = 1.0  # between looks for machines that have come
_NOTICE_S = 60.0  # after which Ray surely knows that a machine is lost
_AVOID_S = _NOTICE_S


@dataclass(frozen=True, kw_only=True)
class MachineChange:
    """Why a group must end before its work is done.

    ``leaving``: a machine leaves; otherwise one has come. ``ends_run``: no other group can follow.
    """

    text: str
    leaving: bool
    ends_run: bool = False


@dataclass(kw_only=True)
class MachinePool:
    """The machines of the cluster that this process has joined.

    Args:
        head: address of the machine with Ray's control process. Nothing survives its loss.
        check: called several times per second while machines are awaited; may raise.
        left_out: machines that must not be used.
    """

    job: Job
    head: str
    check: Callable[[], None]
    log: Log
    left_out: list[Machine] = field(default_factory=list)
    _seen: dict[str, Machine] = field(default_factory=dict)  # by name; also those that are gone
    _avoided: dict[str, float] = field(default_factory=dict)  # by ID, until when
    _placed: set[str] = field(default_factory=set)  # IDs of what was usable at the last placement
    _looked: float = 0.0
    _checkpoint: int | None = None  # the newest one when a larger group became possible

    @property
    def cluster(self) -> ClusterConfig:
        return self.job.cluster

    def usable(self) -> list[Machine]:
        """The machines that can hold their share of the processes, in the order of addresses."""
        leaving = leaving_machines()
        left_out = {entry.name for entry in self.left_out}
        share = self.cluster.devices_per_node
        gpus = share if machine.device(self.cluster) == "cuda" else 0
        machines = [
            candidate
            for candidate in alive_machines()
            if candidate.id not in leaving
            and candidate.name not in left_out
            and candidate.cpus >= share
            and candidate.gpus >= gpus
        ]
        self._seen |= {candidate.name: candidate for candidate in machines}
        return machines

    def wait_for_all(self) -> list[Machine]:
        """Wait until the machines of the job are here; after ``cluster.wait``, for no more.

        Returns all machines that are usable, of which there may be more than the job needs.

        Raises:
            Interrupted: fewer than ``min_nodes`` are here.
        """
        wanted = self.cluster.nodes
        machines = self._wait(lambda count: count >= wanted, wanted, self.cluster.wait)
        if len(machines) < wanted:
            if self.size(len(machines)) == 0:
                raise self._too_few(machines, self.cluster.wait)
            self.log(f"continuing without {self._absent(machines, wanted)}", "warning")
        return machines

    def place(self, placement: Placement) -> Placement:
        """The placement of the processes of a stage on the machines that are here now.

        Waits up to ``cluster.wait`` for as many machines as ``min_nodes`` says.

        Raises:
            Interrupted: too few machines came.
        """
        # Slurm gives a job no further machine; the next attempt of the job gets all of them.
        wait_s = 0 if self.cluster.kind == "slurm" else self.cluster.wait
        single = placement.single
        wanted = 1 if single else self.cluster.fewest_nodes

        def enough(count: int) -> bool:
            return count > 0 if single else self.size(count) > 0

        machines = self._wait(enough, wanted, wait_s)
        if not enough(len(machines)):
            raise self._too_few(machines, wait_s)
        self._checkpoint = None
        self._placed = {entry.id for entry in machines}
        count = 1 if single else self.size(len(machines))
        now = time.monotonic()
        trusted = [entry for entry in machines if self._avoided.get(entry.id, now) <= now]
        if len(trusted) >= count:
            machines = trusted
        return replace(
            placement,
            machines=count,
            processes=1 if single else count * self.cluster.devices_per_node,
            candidates=tuple(machines),
            wait_s=max(self.cluster.wait, _NOTICE_S),
        )

    def avoid(self, lost: Machine) -> None:
        """Prefer other machines for a while: a process died there, perhaps with its machine.

        Ray learns of a lost machine later than the processes of the others do.
        """
        self._avoided[lost.id] = time.monotonic() + _AVOID_S

    def leave_out(self, broken: Machine) -> None:
        """Do not use a machine any more, unless the job cannot do without it."""
        others = [entry for entry in self.usable() if entry.name != broken.name]
        if self.size(len(others)) == 0:
            self.avoid(broken)
            return
        self.left_out.append(broken)
        self.log(f"continuing without {broken.name}: a device failed there", "warning")

    def require_same(self) -> None:
        """Check that the machines of the last placement are still those that are here.

        Raises:
            MachinesChanged: they are not, so Ray might look for room in vain.
        """
        if self._is_time() and self._placed != {entry.id for entry in self.usable()}:
            raise MachinesChanged("the machines changed before the processes started")

    def idle(self, members: Sequence[Machine]) -> str:
        """Names of the usable machines that are not in the group; "" if there are none."""
        used = {member.id for member in members}
        return ", ".join(other.name for other in self.usable() if other.id not in used)

    def with_names(self, counts: Mapping[str, int]) -> str:
        """Counts by address with names: "n1 (10.77.0.1) 12, n2 (10.77.0.2) 11"."""
        names = {entry.address: entry.name for entry in self._seen.values()}
        return ", ".join(
            f"{names.get(address, address)} {count}" for address, count in sorted(counts.items())
        )

    def change(self, placement: Placement, members: Sequence[Machine]) -> MachineChange | None:
        """Whether the group must be formed again, because a machine leaves it or has come.

        Call it several times per second.
        """
        leaving = leaving_machines()
        names = ", ".join(member.name for member in members if member.id in leaving)
        if leaving and (head := self._leaving_head(leaving)) is not None:
            text = f"{head.name}, the head of the Ray cluster, is leaving"
            return MachineChange(text=text, leaving=True, ends_run=True)
        if names:
            return MachineChange(text=f"{names} is leaving", leaving=True)
        if not placement.single and placement.machines < self.cluster.nodes and self._is_time():
            return self._growth(placement, members)
        return None

    def _leaving_head(self, leaving: set[str]) -> Machine | None:
        machines = (entry for entry in alive_machines() if entry.address == self.head)
        return next((entry for entry in machines if entry.id in leaving), None)

    def _growth(self, placement: Placement, members: Sequence[Machine]) -> MachineChange | None:
        """A larger group, right after a checkpoint: little is lost if it fails to form."""
        if self.size(len(self.usable())) <= placement.machines:
            self._checkpoint = None
            return None
        checkpoints = list_checkpoints(placement.run_dir.checkpoints(placement.stage))
        newest = checkpoints[0][0] if checkpoints else 0
        if self._checkpoint is None:
            self._checkpoint = newest
        if newest == self._checkpoint:
            return None
        return MachineChange(text=f"{self.idle(members)} can join", leaving=False)

    def size(self, available: int) -> int:
        """The largest number of machines whose processes share every stage's batch; 0 if none."""
        cluster = self.cluster
        for count in range(min(available, cluster.nodes), cluster.fewest_nodes - 1, -1):
            try:
                for stage in job_queries.training_stages(self.job):
                    train = job_queries.train_config(self.job, stage)
                    job_queries.batches(train, count * cluster.devices_per_node)
            except ConfigError:
                continue
            return count
        return 0

    def _wait(self, enough: Callable[[int], bool], wanted: int, seconds: float) -> list[Machine]:
        """Wait until enough usable machines are here, or the time is over; returns them."""
        deadline = time.monotonic() + seconds
        shown = -1
        while True:
            self.check()
            machines = self.usable()
            if enough(len(machines)) or time.monotonic() >= deadline:
                return machines
            if len(machines) != shown:
                shown = len(machines)
                names = ", ".join(entry.name for entry in machines) or "none"
                self.log(
                    f"waiting for machines, up to {seconds:g} s (cluster.wait): {wanted} needed, "
                    f"here: {names}"
                )
            time.sleep(_POLL_S)

    def _too_few(self, machines: Sequence[Machine], seconds: float) -> Interrupted:
        fewest = self.cluster.fewest_nodes
        waited = f" after {seconds:g} s (cluster.wait)" if seconds else ""
        names = ", ".join(entry.name for entry in machines) or "no machine"
        return Interrupted(
            f"the run needs {fewest} machines (cluster.min_nodes); here{waited}: {names}; "
            f"missing: {self._absent(machines, fewest)}",
            remedy=f"when they are back, {RERUN}",
        )

    def _absent(self, machines: Sequence[Machine], wanted: int) -> str:
        """The machines that are not here, by name where a name is known."""
        hosts = {entry.host for entry in machines}
        known = dict.fromkeys(os.environ.get(EXPECTED, "").split())
        known |= dict.fromkeys(entry.host for entry in self._seen.values())
        names = [host for host in known if host not in hosts]
        return ", ".join(names) or f"{wanted - len(machines)} that never joined the Ray cluster"

    def _is_time(self) -> bool:
        """True once per ``_LOOK_S``."""
        if time.monotonic() - self._looked < _LOOK_S:
            return False
        self._looked = time.monotonic()
        return True
