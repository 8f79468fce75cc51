"""A run on a cluster whose run directories this machine sees, and its machines."""

from __future__ import annotations

import contextlib
import itertools
import shlex
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from pipeline.chaos.driver import END_S, Driver
from pipeline.errors import StageError
from pipeline.layout import RunDir
from pipeline.monitor.events import Event, Follower

_WAIT_S = 30  # of the run for a lost machine
_REACH_S = 60.0  # of a command on a machine, which only starts something


@dataclass(frozen=True, kw_only=True)
class OnCluster:
    """A cluster, and how its machines are reached.

    Attributes:
        name: for ``--on``; '' if the job itself names the cluster.
        runs: folder of the run directories, as this machine sees it.
        nodes: how many machines a run has, no less: another number rounds differently.
        reach, head: see ClusterDriver.
    """

    name: str
    runs: Path
    nodes: int
    reach: str
    head: str = ""

    @property
    def settings(self) -> list[str]:
        """Keys of the job, for both runs."""
        # A machine that was cut off may come back only with the next job of a scheduler.
        return [f"cluster.min_nodes={self.nodes}", f"cluster.wait={_WAIT_S}"]

    def driver(
        self, arguments: Sequence[str], submitted_as: Path, stages: Sequence[str], log: Path
    ) -> ClusterDriver:
        """The driver of a run. ``submitted_as``: its run directory for the commands."""
        on = ["--on", self.name] if self.name else []
        return ClusterDriver(
            arguments=[*arguments, *on, "--run-dir", str(submitted_as)],
            run_dir=RunDir(self.runs / submitted_as.name),
            submitted_as=RunDir(submitted_as),
            reach=self.reach,
            head=self.head,
            stages=stages,
            log=log,
        )


@dataclass(frozen=True, kw_only=True)
class Rank:
    """A process that trains: its host, and its process ID there."""

    number: int
    host: str
    pid: int


@dataclass(kw_only=True)
class ClusterDriver(Driver):
    """The command ``run``, which submits the job and follows it.

    Attributes:
        submitted_as: the run directory for the commands; the cluster may have it elsewhere.
        reach: command that runs a command on a machine, such as "ssh {host}".
        head: host of a Ray that the job has not started itself; '' without one.
    """

    submitted_as: RunDir
    reach: str
    head: str = ""
    _places: dict[tuple[str, int], Follower] = field(default_factory=dict)
    _started: dict[tuple[str, int], Event] = field(default_factory=dict)

    def stop(self) -> int:
        """Stop the run with the command for it; returns the exit code of ``run``."""
        self._stop()
        return self.wait(END_S)

    def end(self) -> None:
        """End the run now, unless it is done."""
        if self.process is None or self.code == 0:
            return
        # The command only follows: the run on the cluster ends with a command of its own.
        self.process.kill()
        self.process.wait()
        self._stop("--now")

    def left_processes(self) -> list[psutil.Process]:
        """Nothing: what the cluster has of a run ends with its job."""
        return []

    def ranks(self) -> list[Rank]:
        """The processes that were the last to begin a stage; they may have ended."""
        # Each process notes where it runs when it begins a stage; a new group does so again.
        for stage in self.stages:
            for number in itertools.count():
                path = self.run_dir.times(stage, number)
                if not path.exists():
                    break
                events = self._places.setdefault((stage, number), Follower(path)).poll()
                for event in events:
                    if event.kind == "start":
                        self._started[stage, number] = event
        if not self._started:
            return []
        # Processes of an earlier stage have ended long ago.
        newest = max(self._started, key=lambda at: self._started[at].time)[0]
        return [
            Rank(number=number, host=event.text, pid=int(event.scalars["pid"]))
            for (stage, number), event in sorted(self._started.items())
            if stage == newest
        ]

    def on_machine(self, host: str, script: str) -> str:
        """Run a shell script on a machine; returns what it prints.

        Raises:
            StageError: the machine cannot be reached, or the script fails.
        """
        command = [*shlex.split(self.reach.replace("{host}", host)), "sh", "-s"]
        cause = f"no answer within {_REACH_S:g} s"
        with contextlib.suppress(subprocess.TimeoutExpired):
            # Through its input: a remote shell would take a second look at quotes of an argument.
            done = subprocess.run(
                command, input=script, capture_output=True, text=True, timeout=_REACH_S, check=False
            )
            if done.returncode == 0:
                return done.stdout
            cause = done.stderr.strip() or f"exit code {done.returncode}"
        raise StageError(
            f"a command on {host} failed: {cause}",
            place=shlex.join(command),
            remedy="--reach must run commands there as root: try it with the command id",
        )

    def _stop(self, *options: str) -> None:
        command = [sys.executable, "-P", "-m", "pipeline", "stop", str(self.submitted_as.path)]
        # Also when the run has just ended, which is no error here.
        with open(self.log, "ab") as log:
            subprocess.run([*command, *options], stdout=log, stderr=subprocess.STDOUT, check=False)
