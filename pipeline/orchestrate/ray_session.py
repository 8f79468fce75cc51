"""Starts a private Ray on this host, with an access token and without dashboard and usage report.

The environment alone decides about access to Ray. It is therefore set before ``import ray``, and
every process that Ray starts inherits it.
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
from pipeline.runtime import environment

_PREFIX = "revcol-ray-"
_RANDOM_SUFFIX = 8  # bytes that mkdtemp appends to the prefix
_ABANDONED_AFTER_S = 60
_LONGEST_PATH = 43  # bytes: Ray appends up to 64 of the 107 that the path of a socket may have


@contextlib.contextmanager
def ray_session(cpus: int, gpus: int, started: Callable[[], None]) -> Iterator[None]:
    """Run Ray while the context is open. Afterwards no process and no file of it is left.

    Args:
        cpus: CPU cores that Ray may assign; may exceed those of the machine.
        gpus: GPUs that Ray may assign.
        started: called once Ray is running, to install signal handlers (``ray.init`` replaces that
            of SIGTERM).

    Raises:
        StageError: the path of the temporary directory is too long, or Ray does not start.
    """
    with _private_directory() as directory:
        token = directory / "token"
        token.touch(mode=0o600)  # restrict access before the secret is written
        token.write_text(secrets.token_hex(32))
        os.environ.update(environment.ray_session(token))
        import ray

        # "local": never join a cluster that happens to run on this host. The output of workers goes
        # to their log files, not to the driver's.
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
            remedy = (
                f"free memory and disk space under {directory.parent}, "
                "or set TMPDIR to another directory"
            )
            raise StageError(f"Ray does not start: {error}", place="ray", remedy=remedy) from error
        started()
        try:
            yield
        finally:
            ray.shutdown()


@contextlib.contextmanager
def _private_directory() -> Iterator[Path]:
    """Create a temporary directory (mode 0700) and remove it at the end.

    The directories of killed predecessors are removed at the start. A directory is in use while its
    file ``lock`` is locked; the kernel releases the lock when the process dies.
    """
    base = Path(tempfile.gettempdir())
    for stale in base.glob(f"{_PREFIX}*"):
        _remove_if_abandoned(stale)
    directory = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=base))
    try:
        if len(os.fsencode(directory)) > _LONGEST_PATH:
            longest = _LONGEST_PATH - len(_PREFIX) - _RANDOM_SUFFIX - 1  # 1: the slash
            raise StageError(
                f"the path {directory} is too long for Ray's sockets",
                place="TMPDIR",
                remedy=f"set TMPDIR to a directory whose path has at most {longest} bytes",
            )
        with open(directory / "lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield directory
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def _remove_if_abandoned(directory: Path) -> None:
    with contextlib.suppress(OSError):  # locked by a live process, or removed by another one
        if not (directory / "lock").exists():
            # Either its owner has not created the lock yet, or a removal was cut short. Dying
            # processes of Ray may also still write here. Its age tells.
            if time.time() - directory.stat().st_mtime > _ABANDONED_AFTER_S:
                shutil.rmtree(directory)
            return
        with open(directory / "lock") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Remove the lock last: a removal that is cut short can then be repeated.
            for path in directory.iterdir():
                if path.is_dir() and not path.is_symlink():
                    shutil.rmtree(path)
                elif path.name != "lock":
                    path.unlink()
            (directory / "lock").unlink()
            directory.rmdir()
