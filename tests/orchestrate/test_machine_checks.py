"""Judgement of what machines report: which one is at fault if their reports differ."""

from __future__ import annotations

import pytest

from pipeline.config.schema import ClusterConfig
from pipeline.orchestrate import machine_checks
from pipeline.orchestrate.machines import Machine
from pipeline.orchestrate.probe import MachineFacts

CUDA = ClusterConfig(kind="slurm", device="cuda", nodes=3, devices_per_node=8)
MACHINES = [
    Machine(id=name, address=f"10.0.0.{number}", host=name, cpus=64.0, gpus=8.0)
    for number, name in enumerate("abc", 1)
]
A, B, C = MACHINES


def facts(gpu_driver: str = "550.54") -> MachineFacts:
    return MachineFacts(
        versions={},
        code={},
        open_files=65536,
        shared_memory=1 << 34,
        free={},
        unwritable={},
        sources={},
        gpu_driver=gpu_driver,
        site="",
        addresses=["10.0.0.1"],
        port=1,
    )


@pytest.mark.parametrize(
    ("offsets", "named"),
    [
        ([0.0, 0.1, 60.0], ["c"]),
        ([0.0, -60.0, 60.0], ["b", "c"]),
        ([60.0, 60.1, 60.0], []),  # the driver's own clock is wrong, and none of the machines'
        ([0.0, 0.0, 6.0], []),  # 6 s, but measured to 2 s only
    ],
)
def test_the_clock_that_differs_from_most_is_named(offsets: list[float], named: list[str]) -> None:
    measured = {machine: (offset, 2.0) for machine, offset in zip(MACHINES, offsets, strict=True)}
    check = machine_checks.clocks(measured)
    assert [fault.machine.host for fault in check.faults] == named


@pytest.mark.parametrize(
    ("unreached", "named"),
    [
        ({A: [], B: [], C: []}, []),
        ({A: ["c"], B: ["c"], C: ["a", "b"]}, ["c"]),
        ({A: [], B: ["c"], C: ["b"]}, ["c"]),  # one of the two must go: the later one
        ({A: ["b"], B: ["a", "c"], C: ["b"]}, ["b"]),
        ({A: ["b", "c"], B: ["a", "c"], C: ["a", "b"]}, ["c", "b"]),
    ],
)
def test_the_fewest_machines_that_explain_lost_connections_are_named(
    unreached: dict[Machine, list[str]], named: list[str]
) -> None:
    assert [machine.host for machine in machine_checks.cut_off(unreached)] == named


def test_another_gpu_driver_and_missing_gpus_are_named() -> None:
    few = Machine(id="d", address="10.0.0.4", host="d", cpus=64.0, gpus=7.0)
    reports = {A: facts(), B: facts(), C: facts("535.1"), few: facts()}
    assert machine_checks.devices(reports, CUDA).lines() == [
        "check devices: c (10.0.0.3): GPU driver 535.1 instead of 550.54",
        "check devices: d (10.0.0.4): Ray has 7 GPUs there, 8 are needed",
        "  -> install the same driver everywhere",
        "  -> lower cluster.devices_per_node",
    ]
    fit = machine_checks.devices({A: facts(), B: facts()}, CUDA)
    assert fit.lines() == ["check devices: 8 GPUs or more on 2 machines, driver 550.54"]
