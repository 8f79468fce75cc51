"""Checks every machine of a cluster before the first stage, and for the command doctor.

    1. facts      versions, limits, space, the site's own check; each machine writes a file into
                  every folder that must be shared
    2. read back  each machine reads the files of all others
    3. network    each machine connects to every other one; then one small all-reduce between them

A machine that is not fit is left out if ``cluster.min_nodes`` allows; its name goes into a file of
the run directory, which keeps a requeued job from asking for it again.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from pipeline.cluster.code_package import module_digests
from pipeline.cluster.record import versions
from pipeline.config.schema import ClusterConfig, Job
from pipeline.errors import StageError
from pipeline.files import write_text
from pipeline.layout import DATASET_JSON, RunDir
from pipeline.orchestrate import machine_checks, probe, probe_network
from pipeline.orchestrate.machine_checks import MachineCheck, MachineFault
from pipeline.orchestrate.machines import Machine, call_on_each
from pipeline.orchestrate.probe import CheckPlan, MachineFacts, ReadBack
from pipeline.orchestrate.probe_network import LinkTest
from pipeline.reporting import Log

OFF = "PIPELINE_NO_MACHINE_CHECKS"  # set by tests of what happens without the checks
ANSWER_S = 60.0  # a machine that has not answered by then is not fit

Check = Callable[[], None]


@dataclass(frozen=True)
class MachinesReport:
    """The checks, in the order in which they ran."""

    machines: list[Machine]
    checks: list[MachineCheck]

    @property
    def unfit(self) -> list[Machine]:
        """The machines with a fault, each once, in the order of ``machines``."""
        bad = {fault.machine for check in self.checks for fault in check.faults}
        return [machine for machine in self.machines if machine in bad]

    def lines(self) -> list[tuple[str, str]]:
        """(line, level) of each check."""
        return [
            (line, "warning" if check.faults else "info")
            for check in self.checks
            for line in check.lines()
        ]


def require(
    job: Job, run_dir: RunDir, machines: Sequence[Machine], check: Check, log: Log
) -> list[Machine]:
    """Check the machines on which a job is about to run.

    Args:
        check: called several times per second; may raise.

    Returns:
        the machines to leave out.

    Raises:
        StageError: fewer machines than ``cluster.min_nodes`` are fit.
    """
    if os.environ.get(OFF):
        return []
    report = check_machines(machines, job.cluster, plan_of(job, run_dir), check)
    for line, level in report.lines():
        log(line, level)
    unfit = report.unfit
    _keep_unfit(run_dir, unfit)
    fit = len(machines) - len(unfit)
    if fit < job.cluster.fewest_nodes:
        faults = [fault for entry in report.checks for fault in entry.faults]
        raise StageError(
            f"{fit} of {len(machines)} machines are fit for the job, and it needs "
            f"{job.cluster.fewest_nodes}\n"
            + "\n".join(f"{fault.machine.name}: {fault.cause}" for fault in faults),
            place="cluster",
            remedy="; ".join(dict.fromkeys(fault.remedy for fault in faults)),
        )
    if unfit:
        log(f"left out: {', '.join(machine.name for machine in unfit)}", "warning")
    return unfit


def plan_of(job: Job, run_dir: RunDir) -> CheckPlan:
    """What the machines of a job must share and read."""
    sources: dict[str, str] = {}
    for name, dataset in job.data.items():
        finished = (run_dir.dataset(name) / DATASET_JSON).is_file()
        if dataset.prepared:
            sources[f"data.{name}.prepared"] = dataset.prepared
        # A source behind a URL is read with retries; a name on a hub has no folder.
        elif os.path.isabs(dataset.root) and not finished:
            sources[f"data.{name}.root"] = dataset.root
    return CheckPlan(
        folders=run_dir.written_by_all,
        sources=sources,
        shard_cache=job.cluster.shard_cache,
        interface=job.cluster.network.interface,
        site_check=job.cluster.site_check,
    )


def check_machines(
    machines: Sequence[Machine], cluster: ClusterConfig, plan: CheckPlan, check: Check
) -> MachinesReport:
    """Run all checks. Needs a connection to Ray.

    Args:
        plan: folders that do not exist yet are created by the driver.
        check: called several times per second; may raise.
    """
    # The machines answer in three rounds: what one has written, the others read in the next one.
    with _nonce_folders(plan) as plan:
        answers = call_on_each(machines, probe.collect_facts, plan, timeout_s=ANSWER_S, check=check)
        facts = {
            machine: answer
            for machine, answer in answers.items()
            if isinstance(answer, MachineFacts)
        }
        silent = [
            _silent(machine, answer) for machine, answer in answers.items() if machine not in facts
        ]
        read, offsets = _read_back(facts, plan, check)
    checks = [
        MachineCheck("answer", f"from {len(facts)} machines", silent),
        machine_checks.shared_folders(plan, facts, read),
        machine_checks.sources(facts),
        machine_checks.space(plan, facts),
        machine_checks.versions(facts, versions()),
        machine_checks.code(facts, module_digests()),
        machine_checks.clocks(offsets),
        machine_checks.limits(facts, cluster),
        machine_checks.devices(facts, cluster),
    ]
    if plan.site_check:
        checks.append(machine_checks.site(facts))
    if len(facts) > 1:
        checks.append(_network(facts, cluster, check))
    return MachinesReport(list(machines), checks)


@contextlib.contextmanager
def _nonce_folders(plan: CheckPlan) -> Iterator[CheckPlan]:
    """Create the folders into which the machines write, with a file of the driver."""
    plan = replace(plan, nonces=f".check-{secrets.token_hex(8)}")
    try:
        for folder in plan.folders:
            (folder / plan.nonces).mkdir(parents=True)
        probe.write_nonces(plan, probe.DRIVER)
        yield plan
    finally:
        for folder in plan.folders:
            shutil.rmtree(folder / plan.nonces, ignore_errors=True)


def _read_back(
    facts: Mapping[Machine, MachineFacts], plan: CheckPlan, check: Check
) -> tuple[dict[Machine, ReadBack], dict[Machine, tuple[float, float]]]:
    """What each machine reads of the others' files; and how far its clock is from the driver's."""
    written = {
        str(folder): [
            probe.DRIVER,
            *(
                machine.id
                for machine, reported in facts.items()
                if str(folder) not in reported.unwritable
            ),
        ]
        for folder in plan.folders
    }
    before = time.time()
    answers = call_on_each(
        list(facts), probe.read_back, plan, written, timeout_s=ANSWER_S, check=check
    )
    after = time.time()
    read = {machine: answer for machine, answer in answers.items() if isinstance(answer, ReadBack)}
    # A machine read its clock at some moment of the call: half its duration is the uncertainty.
    middle, uncertainty = (before + after) / 2, (after - before) / 2
    return read, {machine: (back.clock - middle, uncertainty) for machine, back in read.items()}


def _network(
    facts: Mapping[Machine, MachineFacts], cluster: ClusterConfig, check: Check
) -> MachineCheck:
    interface = cluster.network.interface
    faults = {
        machine: f"has no interface {interface}"
        for machine, reported in facts.items()
        if not reported.addresses
    }
    # An all-reduce with a machine that cannot be reached takes a minute to fail, on all machines.
    for machine in _cut_off([machine for machine in facts if machine not in faults], facts, check):
        over = f" over {interface}" if interface else ""
        faults[machine] = f"no connection with the other machines{over}"
    connected = [machine for machine in facts if machine not in faults]
    rates: dict[Machine, float | str] = {}
    if len(connected) > 1:
        answers = call_on_each(
            connected,
            probe_network.measure_link,
            LinkTest(
                machines=[machine.id for machine in connected],
                meeting_point=f"{connected[0].address}:{facts[connected[0]].port}",
                interface=interface,
                device=cluster.device,
            ),
            timeout_s=ANSWER_S,
            check=check,
            gpus=1 if cluster.device == "cuda" else 0,
        )
        rates = {machine: _rate(answer) for machine, answer in answers.items()}
    return machine_checks.network(faults, rates, interface)


def _cut_off(
    machines: Sequence[Machine], facts: Mapping[Machine, MachineFacts], check: Check
) -> list[Machine]:
    """The machines with which others cannot connect."""
    # The driver's machine first: if only one of two can stay, the driver's does.
    machines = sorted(machines, key=lambda machine: machine.host != os.uname().nodename)
    points = {}
    for machine in machines:
        addresses = facts[machine].addresses
        # Of all interfaces, the one that Ray uses.
        address = machine.address if machine.address in addresses else addresses[0]
        points[machine.id] = f"{address}:{facts[machine].port}"
    answers = call_on_each(
        machines, probe_network.unreachable, points, timeout_s=ANSWER_S, check=check
    )
    return machine_checks.cut_off(
        {
            machine: answer if isinstance(answer, list) else list(points)
            for machine, answer in answers.items()
        }
    )


def _rate(answer: float | Exception | None) -> float | str:
    if isinstance(answer, float):
        return answer
    if answer is None:
        return f"no answer within {ANSWER_S:.0f} s"
    lines = str(answer).strip().splitlines()
    return lines[0] if lines else type(answer).__name__


def _silent(machine: Machine, answer: object) -> MachineFault:
    if answer is None:
        cause = f"no answer within {ANSWER_S:.0f} s"
        return MachineFault(machine, cause, "look for storage that hangs, and for a high load")
    lines = str(answer).strip().splitlines() or [""]
    cause = f"the checks do not run there: {type(answer).__name__}: {lines[-1]}"
    return MachineFault(machine, cause, "install the same environment and checkout on it")


def _keep_unfit(run_dir: RunDir, unfit: Sequence[Machine]) -> None:
    """Name the machines that a requeued job must not get again, one per line."""
    if unfit:
        write_text(run_dir.unfit, "".join(f"{machine.host}\n" for machine in unfit))
    else:
        run_dir.unfit.unlink(missing_ok=True)
