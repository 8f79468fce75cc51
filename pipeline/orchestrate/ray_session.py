"""Starts a private Ray on this host, with an access token and without dashboard and usage report.

The environment alone decides about access to Ray. It is therefore set before ``import ray``, and
every process that Ray starts inherits it. The processes belong to ``ray_keeper``, which ends them
however this process ends.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from pipeline.errors import Interrupted, StageError
from pipeline.orchestrate.ray_connection import ray_connection
from pipeline.orchestrate.ray_loss import RayLost, loss_watched
from pipeline.orchestrate.ray_tasks import Item, Result, map_tasks
from pipeline.orchestrate.user_errors import RERUN
from pipeline.runtime import environment

_PREFIX = "revcol-ray-"
_RANDOM_SUFFIX = 8  # bytes that mkdtemp appends to the prefix
_ABANDONED_AFTER_S = 60
_POLL_S = 0.1
_END_S = 30
_SETTLE_S = 1.0
LONGEST_PATH = 43  # bytes: Ray appends up to 64 of the 107 that the path of a socket may have


class RaySession(ABC):
    """A running Ray that this process is connected with."""

    @abstractmethod
    def check(self) -> None:
        """Call it several times per second; raises RayLost if Ray cannot be used any more."""

    def map_tasks(
        self, function: Callable[[Item], Result], items: Sequence[Item]
    ) -> Iterator[tuple[Item, Result]]:
        """``ray_tasks.map_tasks`` in this session."""
        return map_tasks(function, items, self.check)

    @contextlib.contextmanager
    def explained(self) -> Iterator[None]:
        """Replace an error that a lost server of Ray caused by a RayLost.

        Calls to Ray may fail before the loss is known here.
        """
        try:
            yield
        except (Interrupted, RayLost):
            raise
        except Exception:
            time.sleep(_SETTLE_S)
            self.check()
            raise


class PrivateRay(RaySession):
    """A Ray of our own on this machine: the keeper of its processes, and its reports."""

    def __init__(self, keeper: subprocess.Popen[bytes], errors: Path) -> None:
        self._keeper = keeper
        self._errors = errors  # standard error of the keeper
        self._reports = ""  # a line that is not complete yet
        self._lost: RayLost | None = None

    def check(self) -> None:
        """Call it several times per second.

        Raises:
            RayLost: a server process of Ray died. All others have been killed. Do not call Ray any
                more: it waits for its dead server, and ends this process after a minute.
        """
        for report in self._new_reports():
            _, name, status = report.split()  # the only report after the start is "lost"
            self._lost = _lost_server(name, int(status))
        if self._lost is None and self._keeper.poll() is not None:
            self._lost = RayLost("the process that watches Ray (ray_keeper) died", remedy=RERUN)
        if self._lost is not None:
            raise self._lost

    def is_lost(self) -> bool:
        """Whether ``check`` has raised, or would."""
        return self._lost is not None or self._keeper.poll() is not None or self._has_report()

    def address(self, check: Callable[[], None]) -> str:
        """Wait until Ray has started; returns the address of its control process.

        Raises:
            StageError: Ray does not start.
        """
        while True:
            check()
            for report in self._new_reports(wait_s=_POLL_S):
                kind, _, detail = report.partition(" ")
                if kind == "started":
                    return detail
                raise _not_started(detail)
            if self._keeper.poll() is not None:
                errors = self._errors.read_text(errors="replace").strip().splitlines()
                raise _not_started("".join(errors[-1:]))

    def end(self) -> None:
        """End every process of Ray and remove its files."""
        assert self._keeper.stdin is not None
        self._keeper.stdin.close()
        try:
            self._keeper.wait(_END_S)
        except subprocess.TimeoutExpired:
            self._keeper.kill()  # upon which the kernel kills Ray's servers
            self._keeper.wait()

    def _has_report(self, wait_s: float = 0.0) -> bool:
        """Whether the keeper has written what nobody has read, or has ended."""
        assert self._keeper.stdout is not None
        return bool(select.select([self._keeper.stdout], [], [], wait_s)[0])

    def _new_reports(self, wait_s: float = 0.0) -> list[str]:
        """Complete lines that the keeper has written since the last call."""
        pipe = self._keeper.stdout
        assert pipe is not None
        if self._has_report(wait_s):
            self._reports += os.read(pipe.fileno(), 65536).decode()
        *lines, self._reports = self._reports.split("\n")
        return lines


@contextlib.contextmanager
def ray_session(
    cpus: int, gpus: int, check: Callable[[], None] = lambda: None
) -> Iterator[PrivateRay]:
    """Run Ray while the context is open. Afterwards no process and no file of it is left.

    Signal handlers stay as they are, and no signal to this process or its group reaches Ray.

    Args:
        cpus: CPU cores that Ray may assign; may exceed those of the machine.
        gpus: GPUs that Ray may assign.
        check: called several times per second while Ray starts; may raise to cancel the start.

    Raises:
        StageError: the path of the temporary directory is too long, or Ray does not start.
    """
    with _private_directory() as directory:
        token = directory / "token"
        token.touch(mode=0o600)  # restrict access before the secret is written
        token.write_text(secrets.token_hex(32))
        os.environ.update(environment.ray_session(token))
        session = _start_keeper(directory, cpus, gpus)
        try:
            address = session.address(check)
            # The connection is closed while it is watched: that calls Ray, too.
            with (
                loss_watched(session.is_lost, session.check),
                ray_connection(address, session.check, _not_started),
            ):
                check()
                yield session
        finally:
            session.end()


def _start_keeper(directory: Path, cpus: int, gpus: int) -> PrivateRay:
    errors = directory / "keeper.err"
    # As a file, not as a module: it needs no package of ours. -P: a ray.py in the working directory
    # is not Ray.
    program = [sys.executable, "-P", str(Path(__file__).with_name("ray_keeper.py"))]
    with open(errors, "wb") as standard_error:
        keeper = subprocess.Popen(
            [*program, str(directory), str(cpus), str(gpus)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=standard_error,
            bufsize=0,
            start_new_session=True,
        )
    return PrivateRay(keeper, errors)


def _not_started(cause: str) -> StageError:
    base = tempfile.gettempdir()
    return StageError(
        f"Ray does not start: {cause}",
        place="ray",
        remedy=f"free memory and disk space under {base}, or set TMPDIR to another directory",
    )


def _lost_server(name: str, status: int) -> RayLost:
    """Example: ("raylet", -9) -> "Ray's node process (raylet) was killed by SIGKILL"."""
    label = {"raylet": "node process", "gcs_server": "control process"}[name]
    end = f"ended with status {status}"
    if status < 0:
        end = f"was killed by {signal.Signals(-status).name}"
    return RayLost(
        f"Ray's {label} ({name}) {end}",
        remedy=f"{RERUN}; if it happens again, look for the out-of-memory killer in `dmesg`",
    )


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
        if len(os.fsencode(directory)) > LONGEST_PATH:
            longest = LONGEST_PATH - len(_PREFIX) - _RANDOM_SUFFIX - 1  # 1: the slash
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
