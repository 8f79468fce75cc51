"""The text of a plan: of each training stage its memory, time and bytes, and other settings."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from pipeline.config.devices import DEVICES, DeviceFacts
from pipeline.config.job_queries import batches, dataset_name, training_stages
from pipeline.config.memory import GIB
from pipeline.config.memory_plan import remedy, stage_plan
from pipeline.config.schema import Job
from pipeline.errors import ConfigError
from pipeline.plan.amounts import dataset_bytes, loader_cores, training_images
from pipeline.plan.forecast import Forecast, alternatives, as_written

LABEL = 18  # width of the labels


@dataclass(frozen=True, kw_only=True)
class PlanOptions:
    """For which devices a plan is made.

    Attributes:
        device: a name of ``DEVICES``.
        world_size: number of devices, or of processes on a CPU.
        threads: of a process on a CPU.
        price: of a device per hour; None: not shown.
        images: training images of every stage; None: as the job tells.
    """

    device: str
    world_size: int
    threads: int = 1
    price: float | None = None
    images: int | None = None

    @property
    def facts(self) -> DeviceFacts:
        """Of one process: on a CPU, of its threads together."""
        return on_threads(DEVICES[self.device], self.threads)


def on_threads(device: DeviceFacts, threads: int) -> DeviceFacts:
    """A device that computes on several cores at once; a GPU stays as it is."""
    if device.gib is not None:
        return device
    peak = {precision: threads * value for precision, value in device.peak.items()}
    return replace(device, peak=peak, copy=threads * device.copy)


def plan_text(job: Job, options: PlanOptions) -> str:
    """The plan of a job.

    Raises:
        ConfigError: it does not train, or its batch cannot be shared by so many devices.
    """
    stages = training_stages(job)
    if not stages:
        raise ConfigError("the job trains nothing", remedy="plan a job with pretrain or finetune")
    return "\n\n".join("\n".join(_stage(job, stage, options)) for stage in stages) + "\n"


def _stage(job: Job, stage: str, options: PlanOptions) -> Iterator[str]:
    device = options.facts
    device_bytes = float("inf") if device.gib is None else device.gib * GIB
    plan = stage_plan(job, stage, options.world_size, device_bytes)
    # Before any figure: a batch that cannot be shared has none.
    batches(plan.train, options.world_size)  # raises if the batch cannot be shared
    images = options.images or training_images(job, stage)
    chosen = as_written(plan, device, images)
    yield (
        f"{stage}: {options.world_size} x {options.device}, "
        f"{chosen.sizes.parameters / 1e6:,.1f} million parameters, {plan.train.image_size} pixels, "
        f"global batch {plan.train.global_batch} = "
        f"{options.world_size} x {chosen.micro_batch} x {chosen.accumulation}"
    )
    yield from _memory(chosen)
    if not chosen.fits:
        yield _line("does not fit", remedy(plan))
    yield from _time(chosen)
    yield from _length(chosen, options)
    yield from _bytes(job, stage, chosen)
    yield ""
    yield from settings_table(alternatives(job, stage, plan, device, images), chosen)


def _line(label: str, text: str) -> str:
    return f"  {label:<{LABEL}}{text}"


def _memory(chosen: Forecast) -> Iterator[str]:
    memory = chosen.memory
    of_images = {part: chosen.micro_batch * size for part, size in memory.image_parts.items()}
    parts = [
        f"{part} {amount(size)}"
        for part, size in {**memory.state_parts, **of_images}.items()
        if size
    ]
    yield _line("memory per device", ", ".join(parts))
    limit = (
        "" if chosen.device.gib is None else f" of {amount(chosen.usable)} that tensors can fill"
    )
    yield _line("peak", f"{amount(chosen.needed)}{limit}")


def _time(chosen: Forecast) -> Iterator[str]:
    time = chosen.time
    yield _line(
        "step",
        f"{time.seconds:.3g} s (passes {time.passes:.3g}, collectives {time.collectives:.3g}, "
        f"update {time.update:.3g}), {chosen.images_per_s:,.0f} images/s, "
        f"MFU {chosen.mfu:.1%}, HFU {chosen.hfu:.1%}",
    )
    yield _line("traffic per step", f"{on_disk(time.traffic)} sent by each device")


def _length(chosen: Forecast, options: PlanOptions) -> Iterator[str]:
    if chosen.steps is None or chosen.hours is None:
        yield _line("length", "unknown: the job does not tell the number of images (--images)")
        return
    device_hours = chosen.hours * options.world_size
    cost = "" if options.price is None else f", cost {device_hours * options.price:,.0f}"
    yield _line(
        "length",
        f"{chosen.steps:,} steps, {chosen.hours:,.2f} hours, "
        f"{device_hours:,.1f} device-hours{cost}",
    )


def _bytes(job: Job, stage: str, chosen: Forecast) -> Iterator[str]:
    keep = chosen.train.keep_checkpoints
    regular = chosen.steps // keep.every_steps if keep.every_steps and chosen.steps else 0
    kept = keep.last + regular + int(keep.best)
    size = chosen.checkpoint_bytes
    yield _line(
        "checkpoints", f"{on_disk(size)} each, {on_disk((kept + 1) * size)} while one is written"
    )
    dataset = job.data.get(dataset_name(job, stage))
    if dataset is not None:
        # The figures are those of photographs; generated images are small.
        if chosen.images is not None and dataset.synthetic is None:
            yield _line("dataset", on_disk(dataset_bytes(dataset, chosen.images)))
        cores = loader_cores(dataset, chosen.images_per_s)
        yield _line("loader", f"{cores:,.1f} cores on all machines together")


def settings_table(forecasts: Sequence[Forecast], chosen: Forecast) -> Iterator[str]:
    """Other settings of a stage, the fastest one first, and which of them the job has."""
    columns = chosen.sizes.model.columns
    yield (
        "  ZeRO  stored columns  micro-batch  compiled  peak GiB  fits   s/step  images/s    MFU"
    )
    for number, entry in enumerate(forecasts):
        marks = ["best"] if number == 0 and entry.fits else []
        if _settings(entry) == _settings(chosen):
            marks.append("the job's")
        yield (
            f"  {entry.train.zero_stage:>4}  {f'{entry.stored} of {columns}':>14}  "
            f"{entry.micro_batch:>11}  {'yes' if entry.compiled else 'no':>8}  "
            f"{entry.needed / GIB:>8.1f}  {'yes' if entry.fits else 'no':>4}  "
            f"{entry.time.seconds:>7.3g}  {entry.images_per_s:>8,.0f}  {entry.mfu:>5.1%}"
            f"{'  ' if marks else ''}{', '.join(marks)}"
        )


def _settings(entry: Forecast) -> tuple[int, int, int, bool]:
    return entry.train.zero_stage, entry.stored, entry.micro_batch, entry.compiled


def on_disk(size: float) -> str:
    """Bytes of files and of traffic, in powers of ten: "29.2 GB", "1.56 TB"."""
    for unit, name in ((1e12, "TB"), (1e9, "GB")):
        if size >= unit:
            return f"{size / unit:.3g} {name}"
    return f"{size / 1e6:.3g} MB"


def amount(size: float) -> str:
    """Bytes of memory, in powers of two: "69.8 GiB", "12.3 MiB"."""
    return f"{size / GIB:.1f} GiB" if size >= GIB else f"{size / 2**20:.1f} MiB"
