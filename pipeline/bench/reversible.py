"""``bench reversible``: memory, time and gradients of the columns' modes, one process a case, side by side in one run.

All modes of a number of columns are timed one after the other, and again in further rounds, each in a new process: a moment
in which the machine was busy with something else spoils no ratio. The fastest step counts.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional

from pipeline.bench.chart import Line, chart
from pipeline.bench.live_memory import LiveBytes
from pipeline.bench.workers import MIB, run_case
from pipeline.files import write_json, write_text
from pipeline.model import Network, build
from pipeline.model.fixed_point import remainder_width
from pipeline.runtime.host_allocator import keep_freed_memory

CLASSES = 1000


@dataclass(frozen=True)
class ReversibleCase:
    """One measurement. ``mode``: stored, exact, exact-auto (``stored_columns: auto``) or checkpointed."""

    mode: str
    columns: int
    precision: str = "fp32"
    block: str = "convnext"
    batch: int = 8
    image_size: int = 224
    channels: tuple[int, ...] = (72, 144, 288, 576)
    depths: tuple[int, ...] = (1, 1, 3, 2)
    steps: int = 3  # timed at least
    seconds: float = 5.0  # of timed steps at least
    timed_only: bool = False  # neither memory nor gradients
    alpha: tuple[float, float] | None = None  # uniform in this range; None: the initial 0.5
    device: str = field(default_factory=lambda: "cuda" if torch.cuda.is_available() else "cpu")


class Measurement:
    """A network with parameters and gradients allocated, and a step of it."""

    def __init__(self, case: ReversibleCase, mode: str) -> None:
        self.case, self.device = case, torch.device(case.device)
        torch.manual_seed(0)
        options: dict[str, Any] = {"activations": mode.removesuffix("-auto")}
        options |= {"stored_columns": "auto"} if mode.endswith("-auto") else {}
        self.network: Network = build(
            case.channels, case.depths, case.columns, CLASSES, block=case.block, **options
        )
        if case.alpha is not None:
            for name, parameter in self.network.named_parameters():
                if name.endswith("alpha"):
                    parameter.data.uniform_(*case.alpha)
        self.network.to(self.device)
        for parameter in self.network.parameters():
            parameter.grad = torch.zeros_like(parameter)
        alphas = [
            p.detach().abs().min()
            for n, p in self.network.named_parameters()
            if n.endswith("alpha")
        ]
        widths = [remainder_width(value) for value in torch.stack(alphas).tolist()]
        self.network.remainder_widths = [widths[4 * t : 4 * t + 4] for t in range(case.columns)]
        self.images = torch.randn(case.batch, 3, case.image_size, case.image_size).to(self.device)
        self.labels = torch.randint(0, CLASSES, (case.batch,)).to(self.device)

    def step(self) -> None:
        with torch.autocast(
            self.device.type, torch.bfloat16, enabled=self.case.precision == "bf16"
        ):
            loss = functional.cross_entropy(
                self.network(self.images).logits[-1].float(), self.labels
            )
        loss.backward()

    def gradient(self) -> torch.Tensor:
        """All gradients of one step, flat."""
        for parameter in self.network.parameters():
            assert parameter.grad is not None
            parameter.grad.zero_()
        self.step()
        return torch.cat(
            [p.grad.flatten() for p in self.network.parameters() if p.grad is not None]
        )

    def peak(self) -> float:
        """Bytes alive beyond parameters, gradients and inputs at the worst moment of a step."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            self.step()
            return float(torch.cuda.max_memory_allocated() - before)
        known = [t for p in self.network.parameters() for t in (p, p.grad) if t is not None]
        with LiveBytes([*known, self.images, self.labels]) as live:
            self.step()
        return float(live.peak)

    def seconds(self) -> float:
        """The fastest of some steps."""
        times: list[float] = []
        while len(times) < self.case.steps or sum(times) < self.case.seconds:
            begin = time.perf_counter()
            self.step()
            if self.device.type == "cuda":
                torch.cuda.synchronize()
            times.append(time.perf_counter() - begin)
        return min(times)


def measure(case: ReversibleCase) -> dict[str, Any]:
    """Figures of one case; ``gradient_error`` is relative to plain stored activations of the same weights and images."""
    if case.device == "cpu":
        keep_freed_memory()  # as in training
    measured = Measurement(case, case.mode)
    measured.step()  # compilation and, for exact-auto, the measured column
    if case.timed_only:
        return {"step_s": measured.seconds()}
    peak, seconds = measured.peak(), measured.seconds()
    process = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    gradient, mismatched = (
        measured.gradient(),
        int(measured.network.consistency.mismatched_elements),
    )
    error = 0.0
    if case.mode != "stored":
        del measured
        expected = Measurement(case, "stored").gradient()
        error = float((gradient - expected).norm() / expected.norm())
    return {
        "mode": case.mode,
        "block": case.block,
        "columns": case.columns,
        "precision": case.precision,
        "batch": case.batch,
        "peak_mb": peak / MIB,
        "process_peak_mb": process,
        "step_s": seconds,
        "gradient_error": error,
        "mismatched_elements": mismatched,
    }


def _in_new_process(case: ReversibleCase) -> dict[str, Any]:
    figures = run_case("pipeline.bench.reversible", asdict(case))
    memory = "" if case.timed_only else f"{figures['peak_mb']:.1f} MiB, "
    print(
        f"{case.mode} {case.columns}: {memory}{figures['step_s']:.3f} s",
        file=sys.stderr,
        flush=True,
    )
    return figures


def slopes(cases: Sequence[dict[str, Any]]) -> dict[str, float]:
    """MiB a column by mode, from the fewest to the most columns."""
    result = {}
    for mode in dict.fromkeys(case["mode"] for case in cases):
        own = sorted((case["columns"], case["peak_mb"]) for case in cases if case["mode"] == mode)
        if own[-1][0] > own[0][0]:
            result[mode] = (own[-1][1] - own[0][1]) / (own[-1][0] - own[0][0])
    return result


def table(cases: Sequence[dict[str, Any]]) -> str:
    """The figures and, where stored and checkpointed were measured too, the ratios of times to them."""
    lines = [
        "mode          columns  peak MiB  process MiB    step s  images/s  gradient error  mismatched  x stored  x checkpointed"
    ]
    times = {(case["mode"], case["columns"]): case["step_s"] for case in cases}
    for case in cases:
        ratios = [
            case["step_s"] / times.get((mode, case["columns"]), float("nan"))
            for mode in ("stored", "checkpointed")
        ]
        lines.append(
            f"{case['mode']:<13} {case['columns']:>7} {case['peak_mb']:>9.1f} {case['process_peak_mb']:>12.0f} "
            f"{case['step_s']:>9.3f} {case['images_per_s']:>9.2f} {case['gradient_error']:>15.2e} "
            f"{case['mismatched_elements']:>11} {ratios[0]:>9.2f} {ratios[1]:>15.2f}"
        )
    lines += [f"{mode}: {slope:.2f} MiB a column" for mode, slope in slopes(cases).items()]
    return "\n".join(lines)


def main(
    columns: Sequence[int] = (4, 8, 16, 32),
    modes: Sequence[str] = ("stored", "checkpointed", "exact", "exact-auto"),
    json_path: Path | None = None,
    plot_path: Path | None = None,
    rounds: int = 3,
    **options: Any,
) -> dict[str, Any]:
    """Measure ``modes`` x ``columns`` (``options``: other fields of ``ReversibleCase``), print a table, write JSON and an SVG plot."""
    cases: list[dict[str, Any]] = []
    for count in columns:
        own = [_in_new_process(ReversibleCase(mode, count, **options)) for mode in modes]
        for _ in range(rounds - 1):
            for case in own:
                again = _in_new_process(
                    ReversibleCase(case["mode"], count, timed_only=True, **options)
                )
                case["step_s"] = min(case["step_s"], again["step_s"])
        cases += [case | {"images_per_s": case["batch"] / case["step_s"]} for case in own]
    machine = {"threads": torch.get_num_threads(), "torch": torch.__version__}
    result = {"cases": cases, "slope_mb_per_column": slopes(cases), **machine}
    print(table(cases))
    if json_path is not None:
        write_json(json_path, result)
    if plot_path is not None:
        lines = [
            Line(mode, [(c["columns"], c["peak_mb"]) for c in cases if c["mode"] == mode])
            for mode in modes
        ]
        write_text(
            plot_path, chart(lines, "Activation memory of a training step", "columns", "MiB")
        )
    return result


if __name__ == "__main__":
    print(json.dumps(measure(ReversibleCase(**json.loads(sys.argv[1])))))
