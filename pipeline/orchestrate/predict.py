"""Classifies image files with a run's export: the work behind the command predict."""

from __future__ import annotations

import contextlib
import csv
import glob
import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from rich.console import Console

from pipeline.checkpoint.weights_source import is_weights_file, weights_source
from pipeline.command import command
from pipeline.config.trained_weights import weights_file
from pipeline.errors import DataError, PipelineError
from pipeline.export.classify_files import ClassifiedFile, classify_files
from pipeline.export.reload import load_export
from pipeline.export.weights_model import load_weights
from pipeline.layout import HUB_CONFIG, MODEL_JSON, find_run, runs_in
from pipeline.monitor.console import Display
from pipeline.sources.names import is_hidden, is_image

# Prints results as they come, and returns all of them.
Printer = Callable[[Iterable[ClassifiedFile]], list[ClassifiedFile]]


def predict(
    target: str, images: Sequence[str], *, runs: Path, best: int, batch: int, form: str
) -> None:
    """Print the most probable classes of every image.

    Args:
        target: a run (name or directory), an exported model (its folder, or a file in it), or
            weights that describe themselves: a published file, or a folder for timm.
        images: files, folders and patterns such as ``photos/**/*.jpg``.
        runs: folder of the runs.
        best: classes per image.
        batch: images in one forward pass.
        form: text, json or csv.

    Raises:
        DataError: ``target`` names no exported model.
        PipelineError: some files cannot be classified; all others have been.
    """
    if _is_weights(target):
        model = load_weights(weights_file(target))
    else:
        model = load_export(find_export(target, runs))
    files, missing = find_images(images)
    results = _with_progress(
        classify_files(model, files, best=best, batch=batch),
        total=len(files),
        # Lines on the terminal show the progress themselves; so does a single batch.
        shown=len(files) > batch and not (form == "text" and sys.stdout.isatty()),
    )
    failed = [result for result in [*PRINTERS[form](results), *missing] if result.error]
    if failed:
        count = f"{len(failed)} of {len(files) + len(missing)} images"
        listed = "\n".join(f"    {result.image}: {result.error}" for result in failed)
        raise PipelineError(
            f"{count} could not be classified:\n{listed}",
            remedy="replace or leave out these files; all others are classified",
        )


def _is_weights(target: str) -> bool:
    """True for a weights file, or a folder for timm, that is no exported model of ours."""
    path = weights_source(target).path
    if (path if path.is_dir() else path.parent).joinpath(MODEL_JSON).is_file():
        return False
    return (path / HUB_CONFIG).is_file() or (path.is_file() and is_weights_file(target))


def find_export(target: str, runs: Path) -> Path:
    """The folder of the exported model that ``target`` names.

    Raises:
        DataError: there is none.
    """
    path = Path(target)
    folder = path.parent if path.is_file() else path
    if (folder / MODEL_JSON).is_file():
        return folder
    run_dir = find_run(target, runs)
    if run_dir is None:
        exported = [run.path.name for run in runs_in(runs) if (run.export / MODEL_JSON).is_file()]
        raise DataError(
            "is neither a run nor an exported model",
            place=target,
            remedy=f"runs here with an export: {', '.join(exported) or 'none'}",
        )
    if not (run_dir.export / MODEL_JSON).is_file():
        again = command("run", run_dir.run_yaml, "--run-dir", run_dir.path)
        raise DataError("has no export yet", place=target, remedy=f"finish the run: {again}")
    return run_dir.export


def find_images(words: Iterable[str]) -> tuple[list[Path], list[ClassifiedFile]]:
    """The files that words name, each once; and the words that name none, with the reason."""
    files: dict[Path, None] = {}
    missing = []
    for word in words:
        # A name is taken as it is before it is taken as a pattern: "a[1].jpg" may be a file.
        paths = [Path(word)] if Path(word).exists() else map(Path, glob.glob(word, recursive=True))
        matches = [file for path in sorted(paths) for file in _files_of(path)]
        files |= dict.fromkeys(matches)
        if not matches:
            reason = "a folder without images" if Path(word).is_dir() else "no such file"
            missing.append(ClassifiedFile(word, [], reason))
    return list(files), missing


def _files_of(path: Path) -> list[Path]:
    """A file itself, whatever its name; of a folder, the images in it and below it."""
    if not path.is_dir():
        return [path]
    return sorted(
        file
        for file in path.rglob("*")
        if is_image(file.name) and not is_hidden(file.name) and file.is_file()
    )


def _with_progress(
    results: Iterable[ClassifiedFile], *, total: int, shown: bool
) -> Iterator[ClassifiedFile]:
    # Standard output is for the results alone.
    display = Display(Console(stderr=True, highlight=False))
    start = time.monotonic()
    with display.stage("predict") if shown else contextlib.nullcontext():
        for done, result in enumerate(results, 1):
            if shown:
                rate = done / max(time.monotonic() - start, 1e-3)
                display.progress("", done, total, f"{rate:,.1f} images/s")
            yield result


def _print_text(results: Iterable[ClassifiedFile]) -> list[ClassifiedFile]:
    """One line per image: "a.jpg: rose 76.2%, tulip 12.0%, daisy 3.1%"."""
    printed = []
    for result in results:
        if not result.error:
            classes = ", ".join(f"{name} {share:.1%}" for _, name, share in result.classes)
            print(f"{result.image}: {classes}", flush=True)
        printed.append(result)
    return printed


def _print_csv(results: Iterable[ClassifiedFile]) -> list[ClassifiedFile]:
    """One row per image and class, best class first. Files that failed have no row."""
    printed = []
    writer = csv.writer(sys.stdout, lineterminator="\n")
    writer.writerow(["image", "rank", "id", "name", "probability"])
    for result in results:
        for rank, (class_id, name, probability) in enumerate(result.classes, 1):
            writer.writerow([result.image, rank, class_id, name, f"{probability:.6f}"])
        printed.append(result)
    return printed


def _print_json(results: Iterable[ClassifiedFile]) -> list[ClassifiedFile]:
    """A list with one object per image: its classes, or the error of a file that failed."""
    printed = list(results)
    entries: list[dict[str, object]] = []
    for result in printed:
        classes = [
            {"id": class_id, "name": name, "probability": probability}
            for class_id, name, probability in result.classes
        ]
        outcome = {"error": result.error} if result.error else {"classes": classes}
        entries.append({"image": result.image, **outcome})
    print(json.dumps(entries, indent=2, ensure_ascii=False))
    return printed


PRINTERS: dict[str, Printer] = {"text": _print_text, "json": _print_json, "csv": _print_csv}
