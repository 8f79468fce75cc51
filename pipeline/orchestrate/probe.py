"""What the checks before the first stage do on each machine; Ray calls these functions there.

They report and never judge: ``machine_checks`` compares the reports. Each one returns within
seconds, and leaves nothing behind.
"""

from __future__ import annotations

import os
import resource
import shlex
import shutil
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pipeline.cluster.code_package import module_digests
from pipeline.cluster.record import versions
from pipeline.config.schema import ShardCacheConfig
from pipeline.errors import PipelineError
from pipeline.files import file_digest, json_digest
from pipeline.layout import DATASET_JSON
from pipeline.orchestrate.ports import free_port
from pipeline.orchestrate.probe_network import interface_addresses, own_id
from pipeline.sources.remote import open_storage

DRIVER = "driver"  # name of the file that the driver writes
_LISTED = 1000  # entries of a source folder that are compared
_SITE_CHECK_S = 20


@dataclass(frozen=True, kw_only=True)
class CheckPlan:
    """What to check.

    Attributes:
        folders: must be the same folder on every machine; each holds a folder ``nonces``.
        nonces: name of the folder inside each of ``folders`` into which every machine writes.
        sources: what the job reads, by key: a path, or the URL of a prepared dataset.
        interface: network interface of collectives; empty: the library chooses.
        site_check: command of the site; empty: none.
    """

    folders: Sequence[Path] = ()
    nonces: str = ""
    sources: Mapping[str, str] = field(default_factory=dict)
    shard_cache: ShardCacheConfig | None = None
    interface: str = ""
    site_check: str = ""


@dataclass(frozen=True, kw_only=True)
class MachineFacts:
    """What one machine reports.

    Attributes:
        code: digest of each file of the pipeline, by its relative path.
        open_files: limit that a process may set itself (hard limit).
        shared_memory: size of /dev/shm (bytes).
        free: free bytes by folder.
        unwritable: why a file cannot be written, by folder.
        sources: digest of each source, by key; or, beginning with "!", why it cannot be read.
        site: why the site's own check failed; empty if it did not.
        addresses: of the interface of collectives, or of all interfaces; empty: no such interface.
        port: a port that is free on this machine.
    """

    versions: dict[str, str]
    code: dict[str, str]
    open_files: int
    shared_memory: int
    free: dict[str, int]
    unwritable: dict[str, str]
    sources: dict[str, str]
    gpu_driver: str
    site: str
    addresses: list[str]
    port: int


@dataclass(frozen=True, kw_only=True)
class ReadBack:
    """``missing``: names of the machines whose files cannot be read here, by folder."""

    missing: dict[str, list[str]]
    clock: float  # seconds since 1970


def collect_facts(plan: CheckPlan) -> MachineFacts:
    """Describe this machine, and write a file into every folder that must be shared."""
    return MachineFacts(
        versions=versions(),
        code=module_digests(),
        open_files=_open_files(),
        shared_memory=shutil.disk_usage("/dev/shm").total,
        free=_free(plan),
        unwritable=write_nonces(plan, own_id()),
        sources={key: _source(key, source) for key, source in plan.sources.items()},
        gpu_driver=_gpu_driver(),
        site=_site_check(plan.site_check),
        addresses=interface_addresses(plan.interface),
        port=free_port(),
    )


def write_nonces(plan: CheckPlan, name: str) -> dict[str, str]:
    """Write a file called ``name`` into each folder; why not, by folder.

    The folder for it was created by the driver. It is not created here: a machine that sees
    another folder under this path would get a second tree of files.
    """
    failures: dict[str, str] = {}
    for folder in plan.folders:
        try:
            with open(folder / plan.nonces / name, "w", encoding="utf-8") as file:
                file.write(name)
                file.flush()
                os.fsync(file.fileno())
        except FileNotFoundError:
            failures[str(folder)] = "is another folder than the driver's, or is not mounted"
        except OSError as error:
            failures[str(folder)] = f"cannot be written: {error.strerror}"
    return failures


def read_back(plan: CheckPlan, names: Mapping[str, Sequence[str]]) -> ReadBack:
    """Read the files of the machines ``names``, by folder."""
    missing = {
        folder: [name for name in written if not _holds(Path(folder) / plan.nonces / name, name)]
        for folder, written in names.items()
    }
    return ReadBack(missing=missing, clock=time.time())


def _holds(path: Path, content: str) -> bool:
    try:  # open() asks the server of a network file system; exists() may not
        return path.read_text(encoding="utf-8") == content
    except OSError:
        return False


def _open_files() -> int:
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    return 1 << 30 if hard == resource.RLIM_INFINITY else hard


def _free(plan: CheckPlan) -> dict[str, int]:
    """Free bytes of the folders that a run fills on this machine."""
    # The folders that must be shared lie on one file system: the first stands for all.
    folders = [*plan.folders[:1], Path(os.environ.get("TMPDIR", "/tmp"))]
    if plan.shard_cache is not None:
        folders.append(Path(plan.shard_cache.local_folder))
    free = {str(folder): _free_bytes(folder) for folder in folders}
    if plan.shard_cache is not None and folders[-1].is_dir():
        # What the cache holds already can be replaced.
        cached = sum(entry.stat().st_size for entry in os.scandir(folders[-1]))
        free[str(folders[-1])] += cached
    return free


def _free_bytes(folder: Path) -> int:
    """Free bytes where a folder is, or will be."""
    present = next(path for path in (folder, *folder.parents) if path.exists())
    return shutil.disk_usage(present).free


def _source(key: str, source: str) -> str:
    """A digest of what can be read at a path or URL."""
    try:
        if "://" in source:
            storage, root = open_storage(source)
            return json_digest(storage.read(f"{root}/{DATASET_JSON}").decode())
        folder = Path(source)
        if (folder / DATASET_JSON).is_file():
            return file_digest(folder / DATASET_JSON)
        if folder.is_file():
            return str(folder.stat().st_size)
        return json_digest(sorted(os.listdir(folder))[:_LISTED])
    except PipelineError as error:
        return f"!{error.cause}"
    except FileNotFoundError:
        return "!is not there"
    except OSError as error:
        return f"!cannot be read: {error.strerror}"


def _gpu_driver() -> str:
    try:
        # "NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54.15  Tue ..."
        text = Path("/proc/driver/nvidia/version").read_text(encoding="utf-8")
        return text.partition("Module")[2].split()[0]
    except (OSError, IndexError):
        return ""


def _site_check(command: str) -> str:
    if not command:
        return ""
    try:
        done = subprocess.run(
            shlex.split(command),
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_SITE_CHECK_S,
            check=False,
            stdin=subprocess.DEVNULL,
        )
    except subprocess.TimeoutExpired:
        return f"{command}: no answer within {_SITE_CHECK_S} s"
    except OSError as error:
        return f"{command}: {error.strerror}"
    if done.returncode == 0:
        return ""
    lines = (done.stdout + done.stderr).strip().splitlines() or [""]
    return f"{command}: exit code {done.returncode}: {lines[-1].strip()}"
