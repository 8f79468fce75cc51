"""Where and how the processes of a stage run, and the errors that a new placement may cure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from pipeline.errors import StageError
from pipeline.layout import RunDir
from pipeline.orchestrate.failure_class import PROGRAM, FailureClass
from pipeline.orchestrate.machines import Machine


@dataclass(frozen=True, kw_only=True)
class Placement:
    """Where and how the processes of a stage run.

    ``threads``: compute threads of each process; None: the cores of its machine, shared evenly.
    ``stop_grace_s``: seconds that the processes get after a stop request, to finish the current
    step and write a checkpoint. 0: the stage has nothing to save, so its processes are killed at
    once.
    ``hang_timeout_s``: so long may a process show no progress; 0: nobody looks.
    ``standby_after_s``: processes stand by from then on, see ``standby``; 0: none.
    ``single``: one process is enough, whatever the cluster has.
    ``machines``: the processes are shared evenly by so many machines.
    ``candidates``: the machines that Ray may choose from; None: the only one, of our own Ray.
    """

    stage: str
    processes: int
    threads: int | None
    device: str  # cpu or cuda
    run_dir: RunDir
    stop_grace_s: float = 120.0
    hang_timeout_s: float = 0.0
    standby_after_s: float = 0.0
    single: bool = False
    machines: int = 1
    candidates: tuple[Machine, ...] | None = None
    wait_s: float = 60.0  # for Ray to find room for the processes
    interface: str = ""  # of collectives between machines; '': the libraries choose
    variables: Mapping[str, str] = field(default_factory=dict)  # further ones, for NCCL and gloo

    def log(self, rank: int) -> Path:
        """Output of one process."""
        return self.run_dir.log(self.stage, rank)

    @property
    def fence(self) -> Path:
        return self.run_dir.fence(self.stage)


class GroupDied(StageError):
    """The group failed in a way that a restart may cure."""

    def __init__(
        self,
        cause: str,
        *,
        place: str = "",
        remedy: str = "",
        kind: FailureClass = PROGRAM,
        lost: bool = False,
        machine: Machine | None = None,
    ) -> None:
        super().__init__(cause, place=place, remedy=remedy)
        self.kind = kind
        self.lost = lost  # True: a process died. False: a process raised an exception.
        self.machine = machine  # of the process that died, on a cluster


class MachinesChanged(Exception):
    """The group ends, to be formed again on other machines. Not a failure.

    The message is for the user: "n2 (10.77.0.2) is leaving".
    """
