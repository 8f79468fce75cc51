"""Writes a checkpoint: each rank its own file, then rank 0 commits all of them with one rename.

The protocol of `save`, with its guarantees:

1. Rank 0 chooses a hidden directory (``files.temporary_name``) and tells all ranks.
   A process group that was replaced but is still running has another rank 0, hence another
   directory: two groups never write to the same file.
2. Rank 0 creates that directory, empty.
3. Each rank writes ``rank-<rank>.safetensors`` with the parameter ranges that it owns (fsync).
4. All ranks exchange reports: contents and digest of their file, or why it could not be written.
   If any rank failed, all ranks return that failure: no rank continues with a different answer.
5. Rank 0 checks that the ranges cover every parameter and that it sees every file itself, and
   writes ``manifest.json``. A rank on a machine where the run directory is another folder writes
   its file without an error, but not into this checkpoint.
6. Rank 0 asks ``may_commit``, immediately before the rename: a group that has been replaced in the
   meantime must not commit.
7. Rank 0 renames the directory to ``step-00000500`` and syncs the parent directory. Only now does
   the checkpoint exist; a crash before leaves a hidden directory that the next start deletes.
8. Rank 0 deletes what is left of the hidden directory and the oldest checkpoints.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import SafetensorError

from pipeline.checkpoint.manifest import LoopState, Manifest, step_of
from pipeline.checkpoint.rank_file import HostCopy, RankReport
from pipeline.checkpoint.retention import Retention, delete_checkpoint, delete_others
from pipeline.errors import CheckpointError, StageError
from pipeline.files import fsync_dir, temporary_name

WRITE_ERRORS = (OSError, SafetensorError)  # safetensors reports a full disk as its own error


@dataclass(frozen=True, kw_only=True)
class CheckpointWriter:
    """Writes checkpoints of a stage; every rank has one.

    Args:
        group: process group of its own, over all ranks: the thread that writes must not meet the
            collective operations of training.
        may_commit: whether this process group is still the newest; rank 0 asks.
    """

    group: dist.ProcessGroup
    may_commit: Callable[[], bool]

    def save(
        self, target: Path, copy: HostCopy, state: LoopState, retention: Retention
    ) -> str | None:
        """Write a checkpoint; collective over all ranks. See the steps above.

        Args:
            target: its directory, as `directory_of` names it.
            copy: this rank's ranges of parameters.
            state: state of the training loop, the same on every rank.
            retention: which checkpoints stay.

        Returns:
            None if the checkpoint is complete; otherwise why it could not be written, for example
            because the disk is full. Training may continue: the previous checkpoint stays the
            newest.

        Raises:
            StageError: on rank 0, if a newer process group has replaced this one.
            CheckpointError: on rank 0, if the ranks' ranges do not cover a parameter (a bug).
        """
        # Steps 1 and 2: the hidden directory.
        temporary = self._temporary_directory(target)
        failure = self.on_rank_0(lambda: _make_empty(temporary))
        if failure is not None:
            return failure

        # Steps 3 and 4: one file per rank. Every rank has all reports and draws the same
        # conclusion, so all of them enter the next collective or none does.
        reports = self._write_and_exchange(temporary, copy)
        failure = next((report.failure for report in reports if report.failure is not None), None)
        if failure is None:
            failure = self.on_rank_0(lambda: _require_files(temporary, reports))

        # Steps 5 to 7: the commit.
        if failure is None:
            manifest = _manifest(step_of(target), reports, state)
            failure = self.on_rank_0(lambda: self._commit(temporary, target, manifest))

        # Step 8. After a commit there is no hidden directory any more; after a failure it frees
        # space.
        if dist.get_rank() == 0:
            shutil.rmtree(temporary, ignore_errors=True)
            if failure is None:
                # An old checkpoint that cannot be deleted only costs space; the next save retries.
                with contextlib.suppress(OSError):
                    delete_others(target.parent, retention)
        return failure

    def on_rank_0(self, action: Callable[[], None]) -> str | None:
        """Run ``action`` on rank 0; every rank returns why it failed, or None. Collective."""
        failure: list[str | None] = [None]
        if dist.get_rank() == 0:
            try:
                action()
            except WRITE_ERRORS as error:
                failure = [str(error)]
        dist.broadcast_object_list(failure, src=0, group=self.group)
        return failure[0]

    def _temporary_directory(self, target: Path) -> Path:
        """The same hidden directory on every rank; collective."""
        name = [temporary_name(target.name)]
        dist.broadcast_object_list(name, src=0, group=self.group)
        return target.with_name(name[0])

    def _write_and_exchange(self, directory: Path, copy: HostCopy) -> list[RankReport]:
        """Write this rank's file and return the reports of all ranks, by rank. Collective."""
        rank = dist.get_rank()
        try:
            report = copy.write(directory)
        except WRITE_ERRORS as error:
            # Not raised: the other ranks are about to enter the collective below and would wait
            # there.
            report = RankReport(failure=f"rank {rank}: {error}")
        reports = [RankReport() for _ in range(dist.get_world_size())]
        dist.all_gather_object(reports, report, group=self.group)
        return reports

    def _commit(self, temporary: Path, target: Path, manifest: Manifest) -> None:
        """Steps 5 to 7 on rank 0."""
        # A range that no rank owns would be noticed only when somebody resumes: too late.
        _check_complete(manifest)
        manifest.write(temporary)
        if not self.may_commit():
            shutil.rmtree(temporary, ignore_errors=True)
            raise StageError(
                "a newer group of processes has replaced this one, which ends without a checkpoint",
                place=str(target),
                remedy="nothing to do: the newer group continues",
            )
        # After a crash, a bad step is captured a second time, with the same content.
        if target.exists():
            delete_checkpoint(target)
        # The files are durable already (write_with, write_json). If a crash undoes the rename, the
        # directory has its hidden name; if not, everything in it is complete.
        os.rename(temporary, target)
        fsync_dir(target.parent)


def _make_empty(directory: Path) -> None:
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)


def _require_files(directory: Path, reports: list[RankReport]) -> None:
    """Raise OSError if a file that a rank has written is not here, on rank 0's machine.

    A file is opened rather than looked up: on NFS, only open() asks the server.
    """
    for rank, report in enumerate(reports):
        for name, record in report.files.items():
            try:
                with open(directory / name, "rb") as file:
                    size = file.seek(0, os.SEEK_END)
            except FileNotFoundError:
                raise OSError(
                    f"the file of rank {rank}, written on {report.host}, is not on "
                    f"{os.uname().nodename}: the machines do not share {directory.parent}"
                ) from None
            if size != record["bytes"]:
                raise OSError(
                    f"the file of rank {rank}, written on {report.host}, has {size} instead of "
                    f"{record['bytes']} bytes on {os.uname().nodename}"
                )


def _manifest(step: int, reports: list[RankReport], state: LoopState) -> Manifest:
    """Merge the reports of all ranks."""
    return Manifest(
        step=step,
        shapes={name: shape for report in reports for name, shape in report.shapes.items()},
        kinds=next(report.kinds for report in reports if report.kinds),
        slices=[part for report in reports for part in report.slices],
        files={name: file for report in reports for name, file in report.files.items()},
        state=state,
    )


def _check_complete(manifest: Manifest) -> None:
    """Raise CheckpointError if the slices do not add up to the elements of each parameter."""
    covered = dict.fromkeys(manifest.shapes, 0)
    for part in manifest.slices:
        covered[part.name] += part.length
    for name, shape in manifest.shapes.items():
        elements = torch.Size(shape).numel()
        if covered[name] != elements:
            raise CheckpointError(f"ranks own {covered[name]} of {elements} elements of {name}")
