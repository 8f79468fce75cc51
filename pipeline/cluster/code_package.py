"""The files of the pipeline: what a cluster without a shared checkout gets, and their digest."""

from __future__ import annotations

import shutil
from pathlib import Path

from pipeline.errors import ConfigError
from pipeline.files import file_digest, json_digest
from pipeline.shipped import CONFIGS, JOBS

JOB_FILE = "submitted_job.yaml"  # name of the job in the package
LARGEST = 50 * 2**20  # bytes; the code has a few hundred kilobytes
_PACKAGE = Path(__file__).resolve().parents[1]
_NAMED = 5  # largest files in the error


def code_files() -> dict[str, Path]:
    """The pipeline's modules, configs and jobs by their path in the package, sorted.

    Nothing else of a checkout: no data, no runs, no history.
    """
    folders = [_PACKAGE]
    # Those of an installed package lie inside of it.
    folders += [path for path in (CONFIGS, JOBS) if _PACKAGE not in path.parents]
    return {
        str(path.relative_to(folder.parent)): path
        for folder in folders
        for path in sorted(folder.rglob("*"))
        if path.is_file() and "__pycache__" not in path.parts and not path.name.startswith(".")
    }


def module_digests() -> dict[str, str]:
    """Digest of each module of the pipeline, by its path relative to the package."""
    modules = sorted(_PACKAGE.rglob("*.py"))
    return {str(path.relative_to(_PACKAGE)): file_digest(path) for path in modules}


def code_digest() -> str:
    """Digest of all modules: the same on two machines that run the same code."""
    return json_digest(module_digests())


def write_package(folder: Path, job_text: str) -> None:
    """Copy the code and a job into an empty folder.

    Raises:
        ConfigError: it would be larger than a cluster takes; names the largest files.
    """
    files = code_files()
    sizes = {name: path.stat().st_size for name, path in files.items()}
    total = sum(sizes.values())
    if total > LARGEST:
        largest = sorted(sizes, key=lambda name: -sizes[name])[:_NAMED]
        listed = ", ".join(f"{name} ({sizes[name] / 2**20:,.0f} MiB)" for name in largest)
        raise ConfigError(
            f"the code has {total / 2**20:,.0f} MiB, more than the {LARGEST >> 20} MiB that are "
            "sent to a cluster",
            place=str(_PACKAGE.parent),
            remedy=f"move what is no code out of these folders; the largest files: {listed}",
        )
    for name, path in files.items():
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)
    (folder / JOB_FILE).write_text(job_text, encoding="utf-8")
