"""A copy of a run elsewhere: its checkpoints and small files, in a store that outlives the machine.

``checkpoints.mirror`` in the job names a folder or URL. Below it, a folder of the run's name has
the layout of the run directory. While the run is under way, a thread of the driver uploads what is
new:

1. Checkpoints, newest first, each file followed by a comparison of what the store returns with the
   digest. The manifest comes last: a checkpoint without one is incomplete.
2. Small files that changed: run.json, settings, logs, weights of finished stages, the export.
3. Checkpoints that the run no longer keeps are deleted there too, once the newest is complete.

A run in an empty directory first downloads all of this, then resumes. Prepared datasets are not
copied: preparation makes the same files again.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from pipeline.checkpoint.manifest import MANIFEST_JSON, Manifest, directory_of, list_checkpoints
from pipeline.config.job_queries import ORDER, TRAINING
from pipeline.config.schema import Job
from pipeline.errors import CheckpointError, DataError, PipelineError
from pipeline.files import digest, file_digest, fsync_dir, temporary_name, write_bytes
from pipeline.layout import RunDir
from pipeline.reporting import Log
from pipeline.sources.remote import open_storage
from pipeline.sources.remote_files import WritableStorage

_POLL_S = 1.0  # between looks for new files
_PAUSE_S = 30.0  # after an upload that failed in spite of its retries

# (size, time of the last change in nanoseconds) of a file that was uploaded.
_Version = tuple[int, int]


@dataclass(kw_only=True)
class Mirror:
    """The copy of one run in a store."""

    run_dir: RunDir
    storage: WritableStorage
    root: str  # of this run in the store
    _uploaded: dict[Path, _Version] = field(default_factory=dict)
    # Steps of the complete checkpoints in the store, by stage: listed once.
    _known: dict[str, set[int]] = field(default_factory=dict)

    @classmethod
    def of(cls, job: Job, run_dir: RunDir) -> Mirror | None:
        """The mirror that a job asks for. Raises DataError if its store cannot be opened."""
        if not job.checkpoints.mirror:
            return None
        storage, path = open_storage(job.checkpoints.mirror)
        root = f"{path}/{run_dir.path.name}"
        return cls(run_dir=run_dir, storage=WritableStorage(storage.fs), root=root)

    def sync(self) -> list[str]:
        """Upload what is new; returns a message per checkpoint.

        Raises:
            DataError: the store refuses, or does not answer.
            OSError: a file of the run cannot be read.
        """
        messages = []
        for stage in TRAINING:
            messages += self._sync_checkpoints(stage)
        for path in _small_files(self.run_dir):
            with contextlib.suppress(FileNotFoundError):  # replaced or moved meanwhile
                self._upload_if_new(path)
        return messages

    def restore(self, log: Log) -> None:
        """Download the run into its empty directory; does nothing if the store has none.

        Raises:
            DataError: the store does not answer.
            CheckpointError: none of its checkpoints is intact.
        """
        run_json = self._key(self.run_dir.run_json)
        if self.storage.info(run_json) is None:
            return
        log(f"copying the run from {self.storage.shown(self.root)}")
        for stage in TRAINING:
            self._restore_checkpoint(stage, log)
        keys = [key for key, _ in self.storage.files(self.root) if not self._is_checkpoint(key)]
        # run.json last: a restore that was cut short begins again.
        for key in sorted(keys, key=lambda key: key == run_json):
            write_bytes(self.run_dir.path / key[len(self.root) + 1 :], self.storage.read(key))

    def _sync_checkpoints(self, stage: str) -> list[str]:
        local = list_checkpoints(self.run_dir.checkpoints(stage))
        if not local:
            return []
        folder = self._key(self.run_dir.checkpoints(stage))
        complete = self._known.setdefault(stage, self._complete(folder))
        messages = []
        # Newest first: if the machine goes now, that one is worth the most.
        for step, directory in local:
            if step in complete:
                continue
            try:
                manifest = Manifest.read(directory)
                for name, record in manifest.files.items():
                    self._upload(directory / name, record["xxh3"])
                self._upload(directory / MANIFEST_JSON, file_digest(directory / MANIFEST_JSON))
            except (FileNotFoundError, CheckpointError):
                continue  # deleted meanwhile, or damaged: whoever reads it reports that
            complete.add(step)
            messages.append(f"checkpoint at step {step} of {stage} copied to the mirror")
        kept = {step for step, _ in list_checkpoints(self.run_dir.checkpoints(stage))}
        # A newer one than the newest here stays: it may be the good copy of one that was damaged.
        for step in [step for step in complete - kept if step < max(kept, default=0)]:
            self._delete(f"{folder}/{directory_of(Path(), step).name}")
            complete.remove(step)
        return messages

    def _complete(self, folder: str) -> set[int]:
        """Steps of the complete checkpoints in a folder of the store."""
        if not self.storage.is_folder(folder):
            return set()
        names = {key.split("/")[-2] for key, _ in self.storage.files(folder) if _is_manifest(key)}
        return {int(name.removeprefix("step-")) for name in names}

    def _restore_checkpoint(self, stage: str, log: Log) -> None:
        """Download the newest intact checkpoint of a stage, under its name only when verified."""
        folder = self._key(self.run_dir.checkpoints(stage))
        damaged = []
        for step in sorted(self._complete(folder), reverse=True):
            target = directory_of(self.run_dir.checkpoints(stage), step)
            if target.is_dir():
                return
            temporary = target.with_name(temporary_name(target.name))
            source = f"{folder}/{target.name}"
            try:
                for name in (MANIFEST_JSON, *self._files_of(source)):
                    self._download(f"{source}/{name}", temporary / name)
                Manifest.read(temporary).verify(temporary)
            except CheckpointError as error:
                shutil.rmtree(temporary, ignore_errors=True)
                log(f"damaged checkpoint in the mirror: {error.message}", "warning")
                damaged.append(source)
                continue
            # As in the writer: a checkpoint exists from its rename on.
            temporary.rename(target)
            fsync_dir(target.parent)
            return
        if damaged:
            raise CheckpointError(
                f"none of the {len(damaged)} checkpoints of {stage} in the mirror is intact",
                place=self.storage.shown(folder),
                remedy="restore a copy, or start without it: --set checkpoints.mirror=",
            )

    def _files_of(self, source: str) -> list[str]:
        """Names of the files of a checkpoint in the store; raises CheckpointError."""
        place = f"{source}/{MANIFEST_JSON}"
        try:
            return list(json.loads(self.storage.read(place))["files"])
        except (ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"unreadable ({error})", place=place) from None

    def _download(self, key: str, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.storage.download(key, path)

    def _upload_if_new(self, path: Path) -> None:
        status = path.stat()
        version = (status.st_size, status.st_mtime_ns)
        if self._uploaded.get(path) == version:
            return
        # A copy, because a log grows while it is read.
        content = path.read_bytes()
        self.storage.write(self._key(path), content)
        self._require_same(path, digest(self.storage.read(self._key(path))), digest(content))
        self._uploaded[path] = version

    def _upload(self, path: Path, expected: str) -> None:
        """Upload a file that no longer changes, unless the store has it already."""
        key = self._key(path)
        self.storage.upload(path, key)
        self._require_same(path, self.storage.digest(key), expected)

    def _require_same(self, path: Path, stored: str, expected: str) -> None:
        if stored != expected:
            raise DataError(
                "checksum mismatch: the store returns other bytes than were uploaded",
                place=self.storage.shown(self._key(path)),
                remedy="nothing to do if it happens once: the file is uploaded again",
            )

    def _delete(self, folder: str) -> None:
        # The manifest first: without it the checkpoint is incomplete.
        self.storage.delete(f"{folder}/{MANIFEST_JSON}")
        self.storage.delete(folder)

    def _key(self, path: Path) -> str:
        return f"{self.root}/{path.relative_to(self.run_dir.path)}"

    def _is_checkpoint(self, key: str) -> bool:
        folders = [self._key(self.run_dir.checkpoints(stage)) for stage in TRAINING]
        return any(key.startswith(f"{folder}/") for folder in folders)


@contextlib.contextmanager
def mirrored(mirror: Mirror | None, log: Log, grace_s: float) -> Iterator[None]:
    """Upload in the background while the body runs; at its end, what is left.

    Args:
        grace_s: for what is left. After that the copy stays behind, with a warning.
    """
    if mirror is None:
        yield
        return
    ended = threading.Event()
    # A daemon: a store that does not answer must not keep the process.
    thread = threading.Thread(
        target=_keep_in_sync, args=(mirror, ended, log), name="mirror", daemon=True
    )
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join(grace_s)
        if thread.is_alive():
            log(f"the mirror is not complete after {grace_s:.0f} s", "warning")


def _keep_in_sync(mirror: Mirror, ended: threading.Event, log: Log) -> None:
    last = False
    while not last:
        last = ended.is_set()  # asked before the pass that then is the last one
        pause = _POLL_S if _attempt(mirror.sync, log) else _PAUSE_S
        if not last:
            ended.wait(pause)


def _attempt(sync: Callable[[], list[str]], log: Log) -> bool:
    """One pass; False with a warning if it failed."""
    try:
        for message in sync():
            log(message)
    except (PipelineError, OSError) as error:
        log(f"the mirror could not be written, the run continues: {error}", "warning")
        return False
    return True


def _is_manifest(key: str) -> bool:
    return key.endswith(f"/{MANIFEST_JSON}")


def _small_files(run_dir: RunDir) -> Iterator[Path]:
    """The files of a run that are worth a copy, run.json last: it tells which others are valid."""
    for stage in TRAINING:
        yield from (run_dir.weights(stage), run_dir.description(stage))
        yield run_dir.events(stage)
    yield from sorted(run_dir.export.glob("*"))
    yield from (run_dir.started_with(stage) for stage in ORDER)
    yield from (run_dir.evaluation, run_dir.run_yaml, run_dir.run_log, run_dir.run_json)
