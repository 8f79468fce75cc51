"""Writes an exported model in the formats that other libraries read, and checks each of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

import torch
from safetensors import SafetensorError

from pipeline.config.export_formats import FORMATS
from pipeline.errors import ConfigError, StageError
from pipeline.export.hub.card import write_card
from pipeline.export.hub.write import write_folder
from pipeline.export.programs import write_onnx, write_torch_export
from pipeline.export.reload import Exported, load_export
from pipeline.export.verification import Verification, verify, verify_in_fresh_process
from pipeline.files import replaced_folder, write_json
from pipeline.layout import FORMAT_FOLDERS, VERIFICATION
from pipeline.reporting import Log

# Largest relative difference of logits. Other runtimes have other kernels; bf16 rounds weights.
MOST_DIFFERENT = {"torch_export": 0.0, "onnx": 1e-5, "hub": 0.0}
MOST_DIFFERENT_BF16 = 0.1

Writer = Callable[[Exported, Path], None]


def write_formats(
    export: Path, names: Iterable[str], log: Log, *, hub_precision: str = "fp32"
) -> list[Verification]:
    """Write formats beside an exported model; each appears complete and checked, or not at all.

    Args:
        export: folder of the exported model.
        names: of ``FORMATS``; those that need no folder are skipped.

    Raises:
        StageError: a format cannot be written, or computes something else.
    """
    model = load_export(export)
    dtype = torch.bfloat16 if hub_precision == "bf16" else torch.float32
    writers: dict[str, Writer] = {
        "torch_export": write_torch_export,
        "onnx": write_onnx,
        "hub": partial(write_folder, dtype=dtype),
    }
    # Here, and not in a process of its own: the stage has done that already.
    verifications = [verify("native", export, export)]
    write_json(export / VERIFICATION, verifications[0])
    for name in [name for name in FORMAT_FOLDERS if name in set(names)]:
        log(f"writing {FORMATS[name].title}")
        most = MOST_DIFFERENT[name]
        if name == "hub" and hub_precision == "bf16":
            most = MOST_DIFFERENT_BF16
        # A format that fails its check leaves neither its own files nor those of an earlier export
        # in doubt: the folder appears only after the check.
        with replaced_folder(export / name) as folder:
            try:
                writers[name](model, folder)
            except (OSError, RuntimeError, ValueError, SafetensorError) as error:
                raise StageError(
                    f"the format {name} cannot be written: {error}",
                    place=str(export),
                    remedy="free some disk space, or leave it out of the formats",
                ) from error
            verification = _verified(name, folder, export, most)
            verifications.append(verification)
            write_json(folder / VERIFICATION, verification)
            if name == "hub":
                write_card(folder, model, verifications)
    return verifications


def _verified(name: str, folder: Path, export: Path, most: float) -> Verification:
    verification = verify_in_fresh_process(name, folder, export)
    if verification["relative_difference"] > most:
        raise StageError(
            f"{name} computes other logits than the network: they differ by "
            f"{verification['relative_difference']:.1e} of the largest one",
            place=str(folder),
            remedy=f"leave {name} out of the formats, and report the error",
        )
    return verification


def require_packages(names: Iterable[str]) -> None:
    """Raise ConfigError if a package of these formats is not installed."""
    for name in names:
        if name not in FORMATS:
            raise ConfigError(
                f"there is no format '{name}'", place="--to", remedy=f"one of {', '.join(FORMATS)}"
            )
        if FORMATS[name].missing:
            raise ConfigError(
                f"{name} needs {', '.join(FORMATS[name].missing)}",
                place="--to",
                remedy=FORMATS[name].install,
            )
