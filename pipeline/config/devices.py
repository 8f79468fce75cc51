"""Devices that plans can be made for: memory, peaks, and the speed that training reaches on them.

Peaks are the vendor's, of dense products. What training reaches was measured with RevCol-H in bf16
on an H100 (64 images of 224 pixels, torch 2.11): 430 ms for forward and backward pass with all
columns stored, 579 ms with none. The estimate (``speed.py``) reproduces both; other devices are
scaled by their copy bandwidth.
"""

from __future__ import annotations

from dataclasses import dataclass

GIGA = 1e9
TERA = 1e12


@dataclass(frozen=True, kw_only=True)
class DeviceFacts:
    """One kind of device.

    Attributes:
        title: part of the name that torch reports; '' for a CPU.
        gib: memory (GiB), as the driver reports it; None if the machine's own memory is meant.
        peak: products of the vendor's data sheet (FLOP/s), by precision.
        reached: of the peak, by the products of training.
        copy: bandwidth of element-wise kernels (bytes/s).
        near: bandwidth of collectives per device within a machine (bytes/s).
        far: the same between machines.
        group: devices of a machine.
        launch: seconds of the host per block or level in a forward and backward pass.
    """

    title: str
    gib: float | None
    peak: dict[str, float]
    reached: float
    copy: float
    near: float
    far: float
    group: int
    launch: float


_H100 = {"bf16": 989 * TERA, "fp16": 989 * TERA, "fp32": 67 * TERA}
DEVICES = {
    "h100": DeviceFacts(
        title="H100",
        gib=79.1,
        peak=_H100,
        reached=0.595,
        copy=3.0 * TERA,
        near=330 * GIGA,
        far=45 * GIGA,
        group=8,
        launch=2.9e-3,
    ),
    "h200": DeviceFacts(
        title="H200",
        gib=139.8,
        peak=_H100,
        reached=0.595,
        copy=4.3 * TERA,
        near=330 * GIGA,
        far=45 * GIGA,
        group=8,
        launch=2.9e-3,
    ),
    # Of one core: two fused multiply-adds of eight numbers per cycle at 2.5 GHz. Processes share a
    # machine, so collectives cost copies.
    "cpu": DeviceFacts(
        title="",
        gib=None,
        peak={"bf16": 80 * GIGA, "fp16": 80 * GIGA, "fp32": 80 * GIGA},
        reached=0.5,
        copy=4 * GIGA,
        near=1 * GIGA,
        far=1 * GIGA,
        group=1 << 20,
        launch=1e-3,
    ),
}


def device_named(name: str) -> DeviceFacts | None:
    """The facts about a GPU by the name that torch reports, or None if it is not in the table."""
    return next((known for known in DEVICES.values() if known.title and known.title in name), None)
