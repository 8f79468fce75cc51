"""Judges the reports of the machines, check by check: which machines are not fit, and why.

Each function compares the reports of all machines and returns one ``MachineCheck``: a line for the
log, and the faults by machine.
"""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from pipeline.config.schema import ClusterConfig
from pipeline.orchestrate.machines import Machine
from pipeline.orchestrate.probe import CheckPlan, MachineFacts, ReadBack

CLOCK_S = 5.0  # largest difference of a machine's clock
LEAST_OPEN_FILES = 4096
LEAST_SHARED_MEMORY = 64 << 20  # bytes per process
LEAST_FREE = 1 << 30  # bytes, of a folder that a run fills
_SHOWN = 3  # differing files per machine

Facts = Mapping[Machine, MachineFacts]


@dataclass(frozen=True)
class MachineFault:
    """Why a machine is not fit, and what to do about it."""

    machine: Machine
    cause: str
    remedy: str


@dataclass(frozen=True)
class MachineCheck:
    """The result of one check on all machines. ``summary``: of those that passed it."""

    name: str
    summary: str
    faults: list[MachineFault] = field(default_factory=list)

    def lines(self) -> list[str]:
        """One line if all passed, else one line per fault, and one with what to do."""
        if not self.faults:
            return [f"check {self.name}: {self.summary}"]
        shown = [f"check {self.name}: {fault.machine.name}: {fault.cause}" for fault in self.faults]
        remedies = dict.fromkeys(fault.remedy for fault in self.faults)
        return [*shown, *(f"  -> {remedy}" for remedy in remedies)]


def shared_folders(plan: CheckPlan, facts: Facts, read: Mapping[Machine, ReadBack]) -> MachineCheck:
    """Every machine reads what every other one has written into the run directory."""
    faults = []
    names = {machine.id: machine.name for machine in facts}
    for machine, reported in facts.items():
        cause = ""
        for folder, reason in reported.unwritable.items():
            cause = cause or f"{folder} {reason}"
        for folder, missing in (read[machine].missing if machine in read else {}).items():
            writers = ", ".join(names.get(name, "the driver") for name in missing[:_SHOWN])
            if missing and not cause:
                cause = f"{folder}: files written by {writers} cannot be read here"
        if cause:
            remedy = "mount the same file system there on every machine, writable"
            faults.append(MachineFault(machine, cause, remedy))
    place = plan.folders[0] if plan.folders else "nothing"
    return MachineCheck("run directory", f"{place} is shared by {_count(facts)}", faults)


def sources(facts: Facts) -> MachineCheck:
    """Every machine reads the same data."""
    faults = []
    for key in next(iter(facts.values())).sources if facts else ():
        digests = {machine: reported.sources[key] for machine, reported in facts.items()}
        usual = _most_common(digest for digest in digests.values() if not digest.startswith("!"))
        for machine, digest in digests.items():
            cause = f"{key} {digest[1:]}" if digest.startswith("!") else f"{key} is another folder"
            if digest != usual or digest.startswith("!"):
                remedy = f"make the path or URL of {key} reach the same files on every machine"
                faults.append(MachineFault(machine, cause, remedy))
    return MachineCheck("data", f"the same on {_count(facts)}", faults)


def space(plan: CheckPlan, facts: Facts) -> MachineCheck:
    """Room for checkpoints, temporary files and the cache of shards."""
    cache = plan.shard_cache
    faults = []
    for machine, reported in facts.items():
        for folder, free in reported.free.items():
            of_cache = cache is not None and folder == cache.local_folder
            least = int(cache.max_gib * (1 << 30)) if cache is not None and of_cache else LEAST_FREE
            if free < least:
                cause = f"{_gib(free)} free in {folder}, {_gib(least)} are needed"
                remedy = "lower cluster.shard_cache.max_gib, or " if of_cache else ""
                faults.append(MachineFault(machine, cause, f"{remedy}free some space there"))
    least_free = min((min(reported.free.values()) for reported in facts.values()), default=0)
    return MachineCheck("space", f"{_gib(least_free)} or more free", faults)


def versions(facts: Facts, own: Mapping[str, str]) -> MachineCheck:
    """Every machine has the driver's versions of Python and the libraries."""
    faults = []
    for machine, reported in facts.items():
        different = [
            f"{name} {reported.versions.get(name, 'missing')} instead of {version}"
            for name, version in own.items()
            if reported.versions.get(name) != version
        ]
        if different:
            remedy = "install the same environment on every machine, or share it"
            faults.append(MachineFault(machine, ", ".join(different), remedy))
    shown = ", ".join(f"{name} {own[name]}" for name in ("python", "torch", "ray") if name in own)
    return MachineCheck("versions", f"{shown} on {_count(facts)}", faults)


def code(facts: Facts, own: Mapping[str, str]) -> MachineCheck:
    """Every machine has the driver's files of the pipeline."""
    faults = []
    for machine, reported in facts.items():
        names = sorted(set(own) | set(reported.code))
        different = [name for name in names if own.get(name) != reported.code.get(name)]
        if different:
            rest = f" and {len(different) - _SHOWN} more" if len(different) > _SHOWN else ""
            cause = f"another version of {', '.join(different[:_SHOWN])}{rest}"
            remedy = "use the same checkout on every machine: update it, or share it"
            faults.append(MachineFault(machine, cause, remedy))
    return MachineCheck("code", f"the same {len(own)} files on {_count(facts)}", faults)


def clocks(offsets: Mapping[Machine, tuple[float, float]]) -> MachineCheck:
    """All clocks agree.

    Args:
        offsets: seconds that each clock is ahead of the driver's, and how uncertain that is.
    """
    # The median, with the driver's own clock among them: if one clock is wrong, it is that one
    # which is named, even if it is the driver's machine.
    usual = statistics.median_low([0.0, *(offset for offset, _ in offsets.values())])
    faults = []
    largest = 0.0
    for machine, (offset, uncertainty) in offsets.items():
        ahead = offset - usual
        largest = max(largest, abs(ahead) - uncertainty)
        if abs(ahead) - uncertainty > CLOCK_S:
            cause = f"its clock is {abs(ahead):.0f} s {'ahead' if ahead > 0 else 'behind'}"
            faults.append(MachineFault(machine, cause, "synchronise the clocks (chrony, ntpd)"))
    return MachineCheck("clock", f"within {max(largest, 0.1):.1f} s on {_count(offsets)}", faults)


def limits(facts: Facts, cluster: ClusterConfig) -> MachineCheck:
    """Enough open files and shared memory for the processes of a machine."""
    least = LEAST_SHARED_MEMORY * cluster.devices_per_node
    faults = []
    for machine, reported in facts.items():
        if reported.open_files < LEAST_OPEN_FILES:
            cause = f"{reported.open_files} open files are allowed, {LEAST_OPEN_FILES} are needed"
            remedy = "raise the limit (ulimit -Hn, or LimitNOFILE of the service that starts Ray)"
            faults.append(MachineFault(machine, cause, remedy))
        elif reported.shared_memory < least:
            cause = f"/dev/shm has {reported.shared_memory >> 20} MiB, {least >> 20} are needed"
            remedy = "mount a larger /dev/shm (containers: --shm-size, or an emptyDir in memory)"
            faults.append(MachineFault(machine, cause, remedy))
    files = min((reported.open_files for reported in facts.values()), default=0)
    memory = min((reported.shared_memory for reported in facts.values()), default=0)
    return MachineCheck("limits", f"{files:,} open files, {_gib(memory)} in /dev/shm", faults)


def devices(facts: Facts, cluster: ClusterConfig) -> MachineCheck:
    """Enough devices on each machine, and the same GPU driver."""
    kind = "GPUs" if cluster.device == "cuda" else "CPUs"
    usual = _most_common(reported.gpu_driver for reported in facts.values())
    faults = []
    for machine, reported in facts.items():
        count = machine.gpus if cluster.device == "cuda" else machine.cpus
        if count < cluster.devices_per_node:
            cause = f"Ray has {count:g} {kind} there, {cluster.devices_per_node} are needed"
            faults.append(MachineFault(machine, cause, "lower cluster.devices_per_node"))
        elif cluster.device == "cuda" and reported.gpu_driver != usual:
            cause = f"GPU driver {reported.gpu_driver or 'missing'} instead of {usual}"
            faults.append(MachineFault(machine, cause, "install the same driver everywhere"))
    driver = f", driver {usual}" if usual and cluster.device == "cuda" else ""
    summary = f"{cluster.devices_per_node} {kind} or more on {_count(facts)}{driver}"
    return MachineCheck("devices", summary, faults)


def site(facts: Facts) -> MachineCheck:
    """The site's own check."""
    faults = [
        MachineFault(machine, reported.site, "ask the site's administrators")
        for machine, reported in facts.items()
        if reported.site
    ]
    return MachineCheck("site check", f"passed on {_count(facts)}", faults)


def network(
    faults: Mapping[Machine, str], rates: Mapping[Machine, float | str], interface: str
) -> MachineCheck:
    """Connections between all machines, and the all-reduce over the interface of the job.

    Args:
        faults: why machines were left out of the all-reduce.
        rates: bytes per second of each machine, or why it failed.
    """
    remedy = "see that the interface is up and its name right (cluster.network.interface), and "
    remedy += "that no firewall closes ports between the machines"
    over = f"over {interface}" if interface else "over the interface that the library chooses"
    failed = {machine: text for machine, text in rates.items() if isinstance(text, str)}
    causes = {
        **faults,
        **{machine: f"no all-reduce {over}: {failed[machine]}" for machine in failed},
    }
    slowest = min((rate for rate in rates.values() if isinstance(rate, float)), default=0.0)
    return MachineCheck(
        "network",
        f"all-reduce at {slowest / 2**20:,.0f} MiB/s {over}",
        [MachineFault(machine, cause, remedy) for machine, cause in causes.items()],
    )


def cut_off(unreached: Mapping[Machine, Iterable[str]]) -> list[Machine]:
    """The fewest machines that explain which connections failed.

    Args:
        unreached: IDs of the machines that each one could not reach; all, if it did not answer.
            Of two machines that cannot reach each other, the later one is blamed.

    Example: a and b do not reach c, c reaches nobody -> [c].
    """
    machines = {machine.id: machine for machine in unreached}
    broken = {
        frozenset((machine.id, other))
        for machine, others in unreached.items()
        for other in others
        if other in machines
    }
    guilty = []
    while broken:
        counts = Counter(name for pair in broken for name in pair)
        name = max(reversed(machines), key=lambda name: counts[name])
        guilty.append(machines[name])
        broken = {pair for pair in broken if name not in pair}
    return guilty


def _most_common(values: Iterable[str]) -> str:
    counted = Counter(values).most_common(1)
    return counted[0][0] if counted else ""


def _count(machines: Mapping[Machine, object]) -> str:
    return f"{len(machines)} machine{'s' if len(machines) != 1 else ''}"


def _gib(size: int) -> str:
    return f"{size / 2**30:,.1f} GiB"
