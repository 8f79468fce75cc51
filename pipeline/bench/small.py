"""``bench small``: the job for own images beside a plain CNN and a ResNet-18, on few small images.

All of them get the same training and test images (`pipeline.bench.small_images`) and the same
number of cores, and they take turns. The job comes first: the others may train for as long as the
whole job took, from the start of its processes to the exported model, or for ``seconds``.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import cast

import torch

from pipeline.bench.requirements import require
from pipeline.bench.small_images import Subset, write_subset, write_synthetic
from pipeline.bench.small_networks import NETWORKS, CurvePoint, SmallCase, SmallMetrics
from pipeline.bench.workers import run_case
from pipeline.errors import ConfigError, StageError
from pipeline.files import write_json
from pipeline.layout import RunDir
from pipeline.monitor import tags
from pipeline.monitor.events import read_events

JOB = "own_images"
STDERR = 2  # where the job's output goes, so that stdout has the results alone
SOURCE_VARIABLE = "CIFAR10"  # the folder of images, if none is named


@dataclass(frozen=True, kw_only=True)
class SmallBench:
    """What is measured.

    data: folder with train/ and test/; "": that of the variable CIFAR10, else synthetic images.
    seconds: budget of the networks beside the job; None: the time that the job took.
    threads: of each network; the job decides by itself and uses all cores.
    image_size: side of the networks' images (pixels); the job chooses its own.
    mixup: parameter of the networks' mixup (0: off).
    overrides: further settings of the job, KEY=VALUE.
    """

    subset: Subset
    data: str = ""
    seeds: int = 3
    seconds: float | None = None
    threads: int = 2
    image_size: int = 32
    mixup: float = 0.0
    networks: Sequence[str] = tuple(NETWORKS)
    overrides: Sequence[str] = ()


def run_small_job(images: Path, run_dir: RunDir, seed: int, overrides: Sequence[str]) -> float:
    """Run the whole job in processes of its own, as a user does; its wall time in seconds.

    Raises:
        StageError: the job fails.
    """
    settings = [f"data.root={images}", f"seed={seed}", *overrides]
    command = [sys.executable, "-m", "pipeline", "run", JOB, "--run-dir", str(run_dir.path)]
    for setting in settings:
        command += ["--set", setting]
    started = time.perf_counter()
    code = subprocess.run(command, stdout=STDERR, check=False).returncode
    if code:
        raise StageError(
            f"the job {JOB} ended with exit code {code}",
            place="bench small",
            remedy="see its error above",
        )
    return time.perf_counter() - started


def job_metrics(run_dir: RunDir, seed: int, started: float, seconds: float) -> SmallMetrics:
    """The result of a finished job: accuracy of its stage 'evaluate', curve of its trainings.

    Args:
        started: time at which the job was started (seconds since 1970).
        seconds: wall time of the whole job.
    """
    stages = json.loads(run_dir.run_json.read_text())["stages"]
    training = [stage for stage, record in stages.items() if "steps" in record["metrics"]]
    curve: list[CurvePoint] = [
        {"seconds": event.time - started, "top1": event.scalars[tags.TOP1]}
        for stage in training
        for event in read_events(run_dir.events(stage))
        if event.kind == "evaluation"
    ]
    top1 = float(stages["evaluate"]["metrics"]["top1"])
    steps = [f"{stage} {stages[stage]['metrics']['steps']:.0f} steps" for stage in training]
    return {
        "network": JOB,
        "design": f"jobs/{JOB}.yaml: {', '.join(steps)}",
        "seed": seed,
        "seconds": seconds,
        "top1": top1,
        "parameters": int(stages["export"]["metrics"]["parameters"]),
        "curve": [*curve, {"seconds": seconds, "top1": top1}],
    }


def summary(results: Sequence[SmallMetrics]) -> dict[str, dict[str, float]]:
    """Median, smallest and largest value of seconds and top-1 over the seeds, by network."""
    return {
        network: {
            f"{metric}_{name}": function(
                [float(result[metric]) for result in results if result["network"] == network]
            )
            for metric in ("seconds", "top1")
            for name, function in (("median", statistics.median), ("min", min), ("max", max))
        }
        for network in dict.fromkeys(result["network"] for result in results)
    }


def table(results: Sequence[SmallMetrics]) -> str:
    """Median and range of every network as text."""
    lines = ["network      seconds (range)       top-1 (range)          parameters"]
    parameters = {result["network"]: result["parameters"] for result in results}
    for network, values in summary(results).items():
        seconds = (
            f"{values['seconds_median']:.0f} "
            f"({values['seconds_min']:.0f} to {values['seconds_max']:.0f})"
        )
        top1 = f"{values['top1_median']:.1%} ({values['top1_min']:.1%} to {values['top1_max']:.1%})"
        lines.append(f"{network:<11}  {seconds:<20}  {top1:<23}  {parameters[network]:,}")
    return "\n".join(lines)


def main(bench: SmallBench, json_path: Path | None = None) -> dict[str, object]:
    """Train all networks with every seed, print a table, and write the results to ``json_path``.

    Raises:
        ConfigError: a network is unknown, or its package is not installed.
        DataError: the folder of images cannot be used.
        StageError: the job fails.
    """
    unknown = [name for name in bench.networks if name not in NETWORKS]
    if unknown:
        raise ConfigError(
            f"knows no network {unknown[0]!r}",
            place="bench small",
            remedy=f"choose from: {', '.join(NETWORKS)}",
        )
    require("small", [package for name in bench.networks for package in NETWORKS[name].packages])
    results: list[SmallMetrics] = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        source = bench.data or os.environ.get(SOURCE_VARIABLE, "")
        if not source:
            write_synthetic(folder / "synthetic", bench.subset)
        images = folder / "images"
        counts = write_subset(source or str(folder / "synthetic"), images, bench.subset)
        for seed in range(bench.seeds):
            results += _measure_seed(bench, folder, seed)
    report: dict[str, object] = {
        "cases": results,
        "summary": summary(results),
        "source": source or "synthetic images",
        "images": counts,
        "classes": bench.subset.classes,
        "budget_seconds": bench.seconds or f"wall time of the whole job {JOB} of the same seed",
        "threads": bench.threads,
        "image_size": bench.image_size,
        "augmentation": "flip, shift by up to 1/8, label smoothing 0.1; "
        + (f"mixup {bench.mixup:g}" if bench.mixup else "no mixup"),
        "torch": torch.__version__,
    }
    print(table(results))
    if json_path is not None:
        write_json(json_path, report)
    return report


def _measure_seed(bench: SmallBench, folder: Path, seed: int) -> list[SmallMetrics]:
    """The job, then every network, with one seed. Reports each on stderr."""
    run_dir = RunDir(folder / f"run-{seed}")
    started = time.time()
    seconds = run_small_job(folder / "images", run_dir, seed, bench.overrides)
    results = [job_metrics(run_dir, seed, started, seconds)]
    _report(results[-1])
    for network in bench.networks:
        case = SmallCase(
            network=network,
            directory=str(folder / "images"),
            seed=seed,
            seconds=bench.seconds or seconds,
            threads=bench.threads,
            image_size=bench.image_size,
            mixup=bench.mixup,
        )
        result = run_case("pipeline.bench.small_networks", asdict(case))
        results.append(cast(SmallMetrics, result))
        _report(results[-1])
    return results


def _report(result: SmallMetrics) -> None:
    print(
        f"{result['network']}, seed {result['seed']}: top-1 {result['top1']:.1%} "
        f"in {result['seconds']:.0f} s",
        file=sys.stderr,
        flush=True,
    )
