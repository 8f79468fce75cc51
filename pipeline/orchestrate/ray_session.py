"""A Ray of our own on this machine: token, private short-lived directory, no dashboard, no usage report.

The environment alone decides about access, so it is set before ``import ray`` and inherited by everything Ray starts.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import secrets
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from pipeline.errors import StageError

_PREFIX = "revcol-ray-"
_LONG_AGO = 60  # seconds
_LONGEST = 43  # bytes: Ray appends up to 64 of the 107 that a socket's path may have


@contextlib.contextmanager
def ray_session(cpus: int, gpus: int, started: Callable[[], None]) -> Iterator[None]:
    """Ray for as long as the context is open; afterwards neither a process nor a file of it is left.

    Args:
        cpus: what Ray may place work on; more than the machine has is possible.
        gpus: likewise, devices.
        started: called once Ray is up, for signal handlers (``ray.init`` replaces that of SIGTERM).

    Raises:
        StageError: the directory for temporary files has too long a name, or Ray does not start.
    """
    with _private_directory() as directory:
        token = directory / "token"
        token.touch(mode=0o600)
        token.write_text(secrets.token_hex(32))
        os.environ.update(
            RAY_AUTH_MODE="token",
            RAY_AUTH_TOKEN_PATH=str(token),
            RAY_USAGE_STATS_ENABLED="0",
            RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO="0",
            RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES="1",  # LOCAL_RANK chooses the device, as everywhere
            RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S="3",
            RAY_worker_niceness="0",  # of 15 unless told: anything else on the machine would starve the training
        )
        import ray

        try:
            ray.init(
                address="local",
                num_cpus=cpus,
                num_gpus=gpus,
                include_dashboard=False,
                log_to_driver=False,
                logging_level=logging.ERROR,
                _temp_dir=str(directory),
            )
        except (ConnectionError, RuntimeError, OSError, ValueError) as error:
            remedy = f"free memory and disk space under {directory.parent}, or set TMPDIR to another directory"
            raise StageError(f"Ray does not start: {error}", place="ray", remedy=remedy) from error
        started()
        try:
            yield
        finally:
            ray.shutdown()


@contextlib.contextmanager
def _private_directory() -> Iterator[Path]:
    """A directory (0700) of our own, removed at the end; those of killed predecessors are removed at the start."""
    base = Path(tempfile.gettempdir())
    for stale in base.glob(f"{_PREFIX}*"):
        _remove_if_abandoned(stale)
    directory = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=base))
    try:
        if len(os.fsencode(directory)) > _LONGEST:
            remedy = f"set TMPDIR to a directory whose name has at most {_LONGEST - len(_PREFIX) - 9} bytes"
            raise StageError(
                f"{directory} is too long a name for Ray's sockets", place="TMPDIR", remedy=remedy
            )
        with open(directory / "lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield directory
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def _remove_if_abandoned(directory: Path) -> None:
    """The lock goes last, and what has lost it goes when it is old: processes that are dying may still write."""
    with contextlib.suppress(OSError):
        if not (directory / "lock").exists():  # new, or torn
            if time.time() - directory.stat().st_mtime > _LONG_AGO:
                shutil.rmtree(directory)
            return
        with open(directory / "lock") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            for path in directory.iterdir():
                if path.is_dir() and not path.is_symlink():
                    shutil.rmtree(path)
                elif path.name != "lock":
                    path.unlink()
            (directory / "lock").unlink()
            directory.rmdir()
