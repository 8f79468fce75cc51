"""``bench reversible``: memory, time and gradient error of the activation modes.

Every case runs in a process of its own. For each number of columns all modes are timed one after
the other, in several rounds, and the fastest step of each counts. A moment in which the machine was
busy with something else then spoils neither a time nor a ratio of times.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypedDict, cast

import torch
from torch.nn import functional

from pipeline.bench.chart import Line, chart
from pipeline.bench.live_memory import LiveBytes
from pipeline.bench.workers import MIB, run_case
from pipeline.files import write_json, write_text
from pipeline.model import Activations, build
from pipeline.model.fixed_point import remainder_width
from pipeline.model.param_groups import is_alpha
from pipeline.runtime.host_allocator import keep_freed_memory

CLASSES = 1000


@dataclass(frozen=True, kw_only=True)
class ReversibleCase:
    """One measurement.

    ``mode`` is a value of ``activations`` (stored, exact, checkpointed) or exact-auto, which is
    exact with ``stored_columns: auto``.
    """

    mode: str
    columns: int
    precision: str = "fp32"
    block: str = "convnext"
    batch: int = 8
    image_size: int = 224
    channels: tuple[int, ...] = (72, 144, 288, 576)
    depths: tuple[int, ...] = (1, 1, 3, 2)
    steps: int = 3  # timed steps, at least
    seconds: float = 5.0  # of timed steps, at least
    timed_only: bool = False  # measure neither memory nor gradients
    alpha: tuple[float, float] | None = None  # uniform in this range; None: the initial 0.5
    device: str = field(default_factory=lambda: "cuda" if torch.cuda.is_available() else "cpu")


class CaseMetrics(TypedDict, total=False):
    """Results of one case. A timed-only case has ``step_s`` only; ``main`` adds the throughput."""

    mode: str
    block: str
    columns: int
    precision: str
    batch: int
    peak_mb: float  # MiB of live tensors beyond parameters, gradients and inputs
    process_peak_mb: float
    step_s: float  # of the fastest step
    gradient_error: float  # relative to stored activations, same weights and images
    mismatched_elements: int
    images_per_s: float


class TrainingSetup:
    """A network with allocated gradients, one batch, and a training step on it."""

    def __init__(self, case: ReversibleCase, mode: str) -> None:
        self.case = case
        self.device = torch.device(case.device)
        torch.manual_seed(0)
        self.network = build(
            channels=case.channels,
            depths=case.depths,
            columns=case.columns,
            num_classes=CLASSES,
            block=case.block,
            activations=cast(Activations, mode.removesuffix("-auto")),
            stored_columns="auto" if mode.endswith("-auto") else 0,
        )
        alphas = [p for name, p in self.network.named_parameters() if is_alpha(name)]
        if case.alpha is not None:
            for alpha in alphas:
                alpha.data.uniform_(*case.alpha)
        self.network.to(self.device)
        for parameter in self.network.parameters():
            parameter.grad = torch.zeros_like(parameter)
        # As in training: decide the widths outside the step, so that it does not read alpha.
        smallest = torch.stack([alpha.detach().abs().min() for alpha in alphas]).tolist()
        widths = [remainder_width(value) for value in smallest]
        self.network.remainder_widths = [widths[4 * t : 4 * t + 4] for t in range(case.columns)]
        self.images = torch.randn(case.batch, 3, case.image_size, case.image_size).to(self.device)
        self.labels = torch.randint(0, CLASSES, (case.batch,)).to(self.device)

    def step(self) -> None:
        """Run one forward and backward pass."""
        bf16 = self.case.precision == "bf16"
        with torch.autocast(self.device.type, torch.bfloat16, enabled=bf16):
            logits = self.network(self.images).logits[-1]
            loss = functional.cross_entropy(logits.float(), self.labels)
        loss.backward()

    def gradient(self) -> torch.Tensor:
        """Run one step from zeroed gradients. Returns all gradients, flattened into one vector."""
        for parameter in self.network.parameters():
            assert parameter.grad is not None
            parameter.grad.zero_()
        self.step()
        return torch.cat(
            [p.grad.flatten() for p in self.network.parameters() if p.grad is not None]
        )

    def peak_bytes(self) -> float:
        """Run one step. Returns its peak memory beyond parameters, gradients and inputs."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            self.step()
            return float(torch.cuda.max_memory_allocated() - before)
        known = [t for p in self.network.parameters() for t in (p, p.grad) if t is not None]
        with LiveBytes([*known, self.images, self.labels]) as live:
            self.step()
        return float(live.peak)

    def fastest_step(self) -> float:
        """Time several steps and return the seconds of the fastest one."""
        times: list[float] = []
        while len(times) < self.case.steps or sum(times) < self.case.seconds:
            begin = time.perf_counter()
            self.step()
            if self.device.type == "cuda":
                torch.cuda.synchronize()
            times.append(time.perf_counter() - begin)
        return min(times)


def measure(case: ReversibleCase) -> CaseMetrics:
    """Measure one case in this process."""
    if case.device == "cpu":
        keep_freed_memory()  # as in training
    setup = TrainingSetup(case, case.mode)
    # Warm up: this step compiles the kernels and, for exact-auto, measures the stored column.
    setup.step()
    if case.timed_only:
        return CaseMetrics(step_s=setup.fastest_step())
    peak = setup.peak_bytes()
    seconds = setup.fastest_step()
    process_peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    gradient = setup.gradient()
    mismatched = int(setup.network.consistency.mismatched_elements)
    error = 0.0
    if case.mode != "stored":
        del setup  # frees the first network before the second is built
        expected = TrainingSetup(case, "stored").gradient()
        error = float((gradient - expected).norm() / expected.norm())
    return CaseMetrics(
        mode=case.mode,
        block=case.block,
        columns=case.columns,
        precision=case.precision,
        batch=case.batch,
        peak_mb=peak / MIB,
        process_peak_mb=process_peak,
        step_s=seconds,
        gradient_error=error,
        mismatched_elements=mismatched,
    )


def _in_new_process(case: ReversibleCase) -> CaseMetrics:
    metrics = cast(CaseMetrics, run_case("pipeline.bench.reversible", asdict(case)))
    memory = "" if case.timed_only else f"{metrics['peak_mb']:.1f} MiB, "
    print(
        f"{case.mode} {case.columns}: {memory}{metrics['step_s']:.3f} s",
        file=sys.stderr,
        flush=True,
    )
    return metrics


def slopes(cases: Sequence[CaseMetrics]) -> dict[str, float]:
    """Return MiB per column by mode, between the fewest and the most columns.

    Example: 120 MiB with 4 columns and 124 MiB with 16: (124 - 120) / (16 - 4) = 0.33.
    """
    result = {}
    for mode in dict.fromkeys(case["mode"] for case in cases):
        points = sorted(
            (case["columns"], case["peak_mb"]) for case in cases if case["mode"] == mode
        )
        fewest, least = points[0]
        most, greatest = points[-1]
        if most > fewest:
            result[mode] = (greatest - least) / (most - fewest)
    return result


def table(cases: Sequence[CaseMetrics]) -> str:
    """Format the metrics and the ratios of step times to those of stored and checkpointed."""
    lines = [
        "mode          columns  peak MiB  process MiB    step s  images/s  gradient error"
        "  mismatched  x stored  x checkpointed"
    ]
    times = {(case["mode"], case["columns"]): case["step_s"] for case in cases}
    for case in cases:
        # NaN where the other mode was not measured.
        to_stored, to_checkpointed = (
            case["step_s"] / times.get((mode, case["columns"]), float("nan"))
            for mode in ("stored", "checkpointed")
        )
        lines.append(
            f"{case['mode']:<13} {case['columns']:>7} {case['peak_mb']:>9.1f} "
            f"{case['process_peak_mb']:>12.0f} {case['step_s']:>9.3f} {case['images_per_s']:>9.2f} "
            f"{case['gradient_error']:>15.2e} {case['mismatched_elements']:>11} "
            f"{to_stored:>9.2f} {to_checkpointed:>15.2f}"
        )
    lines += [f"{mode}: {slope:.2f} MiB per column" for mode, slope in slopes(cases).items()]
    return "\n".join(lines)


def _measure_modes(
    columns: int, modes: Sequence[str], rounds: int, options: dict[str, Any]
) -> list[CaseMetrics]:
    """Measure all modes with this number of columns, then time them again in further rounds."""
    cases = [
        _in_new_process(ReversibleCase(mode=mode, columns=columns, **options)) for mode in modes
    ]
    for _ in range(rounds - 1):
        for case in cases:
            timed = _in_new_process(
                ReversibleCase(mode=case["mode"], columns=columns, timed_only=True, **options)
            )
            case["step_s"] = min(case["step_s"], timed["step_s"])
    for case in cases:
        case["images_per_s"] = case["batch"] / case["step_s"]
    return cases


def main(
    columns: Sequence[int] = (4, 8, 16, 32),
    modes: Sequence[str] = ("stored", "checkpointed", "exact", "exact-auto"),
    json_path: Path | None = None,
    plot_path: Path | None = None,
    rounds: int = 3,
    **options: Any,
) -> dict[str, object]:
    """Measure ``modes`` x ``columns``, print a table, and write JSON and an SVG plot.

    ``options`` are further fields of ``ReversibleCase``.
    """
    cases: list[CaseMetrics] = []
    for count in columns:
        cases += _measure_modes(count, modes, rounds, options)
    result = {
        "cases": cases,
        "slope_mb_per_column": slopes(cases),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }
    print(table(cases))
    if json_path is not None:
        write_json(json_path, result)
    if plot_path is not None:
        lines = [
            Line(mode, [(c["columns"], c["peak_mb"]) for c in cases if c["mode"] == mode])
            for mode in modes
        ]
        title = "Activation memory of a training step"
        write_text(plot_path, chart(lines, title, "columns", "MiB"))
    return result


if __name__ == "__main__":
    print(json.dumps(measure(ReversibleCase(**json.loads(sys.argv[1])))))
