"""A real Slurm on machines of the tests: the controller and the user on n4, a slurmd on n1 to n3.

Debian's packages are installed if they are missing (as root, with network).
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from pathlib import Path

from tests.cluster import debian
from tests.cluster.fabric import Fabric, FabricMachine, one_core
from tests.cluster.processes import wait_until

CPUS = 2  # per machine, whatever the host has
_PROGRAMS = ("slurmctld", "slurmd", "munged", "sbatch")
# Every site differs; these are the defaults where nothing is tested about them. The partition
# "urgent" preempts the other two: "normal" with a grace of 40 s, "abrupt" with Slurm's default, 0.
# A requeued job waits for `cred_expire`, 120 s by default; within it, a busy machine must start the
# step that srun asks for.
_CONFIGURATION = """
ClusterName=tests
SlurmctldHost=n4({controller})
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket=/tmp/munge/socket,cred_expire=20
StateSaveLocation={folder}/state
SlurmdSpoolDir=/tmp/slurmd
SlurmctldPidFile=/tmp/slurmctld.pid
SlurmdPidFile=/tmp/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
ProctrackType=proctrack/{tracking}
TaskPlugin=task/none
MpiDefault=none
ReturnToService=2
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=2,bf_interval=2,batch_sched_delay=1
KillWait=30
MinJobAge=3600
OverTimeLimit=0
SlurmdTimeout=20
SlurmctldTimeout=20
SlurmdParameters=config_overrides
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
AccountingStorageType=accounting_storage/none
NodeName=n1 NodeAddr={addresses[0]} CPUs={cpus} RealMemory=4000 Feature=fast State=UNKNOWN
NodeName=n2 NodeAddr={addresses[1]} CPUs={cpus} RealMemory=4000 Feature=fast State=UNKNOWN
NodeName=n3 NodeAddr={addresses[2]} CPUs={cpus} RealMemory=4000 State=UNKNOWN
PartitionName=normal Nodes=n[1-3] Default=YES MaxTime=INFINITE PriorityTier=1 GraceTime=40
PartitionName=abrupt Nodes=n[1-3] MaxTime=INFINITE PriorityTier=1
PartitionName=urgent Nodes=n[1-3] MaxTime=INFINITE PriorityTier=10
"""


def install() -> None:
    """Install Debian's Slurm, once per host."""
    debian.install(_PROGRAMS, ["slurm-wlm", "munge"])


@dataclass(kw_only=True)
class SlurmMachines:
    """The machines, and the folder that all of them see.

    ``one_core``: a job has one core of each machine.
    """

    fabric: Fabric
    folder: Path
    tracking: str = "linuxproc"
    one_core: bool = False

    @property
    def environment(self) -> dict[str, str]:
        return {"SLURM_CONF": str(self._state / "slurm.conf")}

    @property
    def login(self) -> FabricMachine:
        """The machine of the user."""
        return self.fabric["n4"]

    @property
    def _state(self) -> Path:
        return self.folder / "slurm"

    def up(self) -> None:
        """Start the machines and Slurm."""
        machines = [self.fabric.up(f"n{number}") for number in (1, 2, 3, 4)]
        (self._state / "state").mkdir(parents=True)
        (self._state / "munge.key").write_bytes(secrets.token_bytes(1024))
        text = _CONFIGURATION.format(
            folder=self._state,
            controller=machines[3].address,
            addresses=[machine.address for machine in machines],
            cpus=CPUS,
            tracking=self.tracking,
        )
        (self._state / "slurm.conf").write_text(text)
        (self._state / "cgroup.conf").write_text(
            "CgroupPlugin=cgroup/v1\nCgroupMountpoint=/sys/fs/cgroup\n"
        )
        for machine in machines:
            self._start_munge(machine)
        self.login.run("slurmctld", "-i", environment=self.environment)
        for machine in machines[:3]:
            self._start_slurmd(machine)
        self.wait_for_idle(3)

    def again(self, name: str) -> None:
        """Start a machine that was killed."""
        machine = self.fabric.up(name)
        self._start_munge(machine)
        self._start_slurmd(machine)
        self.wait_for_idle(3)

    def wait_for_idle(self, count: int, timeout_s: float = 120) -> None:
        """Wait until so many machines have nothing to do."""

        def idle() -> bool:
            states = self.run(*["sinfo", "-h", "-N"], *["-p", "normal", "-o", "%T"]).split()
            return states.count("idle") == count

        wait_until(idle, f"{count} idle machines", timeout_s, poll_s=0.2)

    def run(self, *arguments: str | Path, check: bool = True) -> str:
        """Standard output of a command of the user."""
        return self.login.run(*arguments, environment=self.environment, check=check).stdout

    def job(self, job_id: str) -> dict[str, str]:
        """What Slurm knows of a job."""
        text = self.run("scontrol", "show", "job", "--oneliner", job_id)
        return dict(word.split("=", 1) for word in text.split() if "=" in word)

    def _start_slurmd(self, machine: FabricMachine) -> None:
        before = one_core(machine.number) if self.one_core else []
        machine.run(*before, "slurmd", environment=self.environment)

    def _start_munge(self, machine: FabricMachine) -> None:
        folder = "/tmp/munge"
        machine.run("mkdir", "-p", folder, "/tmp/slurmd")
        machine.run("cp", self._state / "munge.key", f"{folder}/key")
        machine.run("chmod", "0600", f"{folder}/key")
        options = [
            *("--force", f"--key-file={folder}/key", f"--socket={folder}/socket"),
            *(f"--pid-file={folder}/pid", f"--log-file={folder}/log"),
            f"--seed-file={folder}/seed",
        ]
        machine.run("munged", *options)
