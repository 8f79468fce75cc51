"""Commands that measure: bench reversible, loader, published, prepare and small."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pipeline.cli.options import JsonFile, Overrides

app = typer.Typer(
    help="Run a benchmark against its baselines.", no_args_is_help=True, rich_markup_mode=None
)


@app.command("reversible")
def bench_reversible(
    json_file: JsonFile = None,
    plot: Annotated[
        Path | None,
        typer.Option(help="Also plot memory against columns (SVG).", show_default=False),
    ] = None,
    columns: Annotated[
        str, typer.Option(help="Numbers of columns, comma-separated.")
    ] = "4,8,16,32",
    precision: Annotated[str, typer.Option(help="fp32 or bf16.")] = "fp32",
    batch: Annotated[int, typer.Option(help="Images per step.")] = 8,
    rounds: Annotated[
        int, typer.Option(min=1, help="Timings per case, each in a new process.")
    ] = 3,
) -> None:
    """Measure memory, step time and gradients of every activation mode."""
    from pipeline.bench import reversible

    # typer has no type for a list in one argument.
    try:
        counts = [int(count) for count in columns.split(",")]
    except ValueError:
        raise typer.BadParameter("needs numbers such as 4,8,16", param_hint="--columns") from None
    reversible.main(
        counts, json_path=json_file, plot_path=plot, precision=precision, batch=batch, rounds=rounds
    )


@app.command("loader")
def bench_loader(json_file: JsonFile = None) -> None:
    """Measure images per second and memory of this loader and of three others.

    The others are PyTorch's DataLoader with Pillow, WebDataset and Hugging Face datasets.
    """
    from pipeline.bench import loader

    loader.main(json_file)


@app.command("published")
def bench_published(json_file: JsonFile = None) -> None:
    """Measure images per second of an evaluation on the published pixels, beside timm's loader."""
    from pipeline.bench import published

    published.main(json_file)


@app.command("prepare")
def bench_prepare(json_file: JsonFile = None) -> None:
    """Measure images per second of preparation and of a Pillow process pool."""
    from pipeline.bench import prepare

    prepare.main(json_file)


@app.command("small")
def bench_small(
    data: Annotated[
        str,
        typer.Option(
            help="Folder with train/ and test/, each with one folder or tar per class. Default: "
            "the variable CIFAR10, else synthetic images.",
            show_default=False,
        ),
    ] = "",
    seeds: Annotated[int, typer.Option(min=1, help="Trainings of each network.")] = 3,
    classes: Annotated[int, typer.Option(min=2, help="The first classes by name.")] = 6,
    images_per_class: Annotated[
        int, typer.Option(min=1, help="Training images of each class, the first by name.")
    ] = 300,
    test_images_per_class: Annotated[
        int, typer.Option(min=1, help="Test images of each class, the first by name.")
    ] = 500,
    seconds: Annotated[
        float | None,
        typer.Option(
            help="Training time of the other networks. Default: as long as the whole job took.",
            show_default=False,
        ),
    ] = None,
    threads: Annotated[int, typer.Option(min=1, help="Threads of the other networks.")] = 2,
    image_size: Annotated[
        int, typer.Option(min=16, help="Side of the other networks' images (pixels).")
    ] = 32,
    mixup: Annotated[
        float, typer.Option(min=0, help="Mixup of the other networks (0: off).")
    ] = 0.0,
    networks: Annotated[
        str, typer.Option(help="The other networks, comma-separated.")
    ] = "cnn,resnet18",
    overrides: Overrides = None,
    json_file: JsonFile = None,
) -> None:
    """Compare the job own_images with a plain CNN and a ResNet-18 on few small images.

    --set changes the job.
    """
    from pipeline.bench.small import SmallBench, main
    from pipeline.bench.small_images import Subset

    bench = SmallBench(
        subset=Subset(
            classes=classes,
            images_per_class=images_per_class,
            test_images_per_class=test_images_per_class,
        ),
        data=data,
        seeds=seeds,
        seconds=seconds,
        threads=threads,
        image_size=image_size,
        mixup=mixup,
        networks=[name for name in networks.split(",") if name],
        overrides=overrides or (),
    )
    main(bench, json_file)
