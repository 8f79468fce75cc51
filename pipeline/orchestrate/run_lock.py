"""One driver per run: a lock of the file system, and beside it an owner file that is kept fresh.

A lock (flock) is released by the kernel when its holder ends, however it ends. On a disk of this
machine it is all that is needed. On shared storage it may be refused (Lustre without -o flock),
exclude the processes of one machine only (BeeGFS, Lustre with -o localflock), or stay held for a
machine that is gone (NFSv4, until its lease ends). So the driver also writes ``owner.json`` and
renews it every few seconds: whoever sees a renewal is not alone.

What a new driver does on shared storage:

    owner.json names                        lock        then
    ------------------------------------------------------------------------------------------
    nobody                                  taken       refused
    nobody                                  free, none  takes the run
    a process of this machine, alive        any         refused
    a process of this machine, ended        free, none  takes the run
    another machine, which renews it        any         refused: host and job are named
    another machine, which does not         any         takes the run, LEASE_S later

Instead of being refused by an earlier attempt of its own job, which the scheduler has ended, it
waits. Machines' clocks are compared only where they differ by minutes: a renewal is a change that
this process has seen. Two drivers may start in the same moment; so each looks at the owner file a
second time after it has written its own, and the last one that wrote continues.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import secrets
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Literal

from pydantic import BaseModel, ConfigDict, Field

from pipeline.cluster.shared_paths import LOCAL_TYPES, mount_of
from pipeline.errors import ConfigError
from pipeline.files import write_json
from pipeline.layout import RunDir
from pipeline.runtime.environment import job_id, restarts

RENEW_S = 4.0
LEASE_S = 30.0  # without a renewal for so long, the owner is gone
_LONG_AGO_S = 600.0  # older than that by the clock: gone, no need to watch
_SETTLE_S = 2.0
_POLL_S = 0.5
_PREDECESSOR_S = 600.0  # longest wait for an earlier attempt of the same job
_ATTEMPTS = 5
_PAUSE_S = 0.02
_NO_LOCKS = {errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL}

Lock = Literal["ours", "taken", "unsupported"]


class RunOwner(BaseModel):
    """The content of ``owner.json``: the driver that works on a run."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    host: str = Field(description="Name of the machine.")
    system: str = Field(description="Boot and process namespace: where the process ID counts.")
    pid: int
    started: int = Field(description="Start of the process (clock ticks since boot).")
    token: str = Field(description="Random: no two drivers have the same.")
    job: str = Field("", description="Job of the scheduler; empty if there is none.")
    attempt: int = Field(0, description="How often the scheduler had restarted the job.")
    renewed: float = Field(0.0, description="Time of the last renewal (seconds since 1970).")

    @classmethod
    def of_this_process(cls) -> RunOwner:
        """This process as the owner."""
        return cls(
            host=os.uname().nodename,
            system=_system(),
            pid=os.getpid(),
            started=_start_of(os.getpid()),
            token=secrets.token_hex(8),
            job=job_id(),
            attempt=restarts(),
        )

    @property
    def name(self) -> str:
        """For messages: "process 4711 on gpu-17 (job 8123)"."""
        return f"process {self.pid} on {self.host}" + (f" (job {self.job})" if self.job else "")

    @property
    def is_here(self) -> bool:
        """True if the process, alive or not, belongs to this machine."""
        return self.host == os.uname().nodename and self.system == _system()

    @property
    def has_ended(self) -> bool:
        """True if this machine knows that the process is gone. False: it lives, or is elsewhere."""
        if self.is_here:
            return _start_of(self.pid) != self.started
        boot, own_boot = (system.partition(" ")[0] for system in (self.system, _system()))
        return self.host == os.uname().nodename and boot != own_boot  # the machine has restarted


def make_folder(path: Path) -> None:
    """Create the folder of a run. Raises ConfigError if that is not possible."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"cannot be created: {error.strerror} ({error.filename})",
            place=str(path),
            remedy="choose another folder with --run-dir, or mount the disk that it lies on",
        ) from None


def read_owner(run_dir: RunDir) -> RunOwner | None:
    """The driver that works on a run, or that did until it was killed; None without one."""
    try:  # open() asks the server of a network file system; exists() may not
        return RunOwner.model_validate(json.loads(run_dir.owner.read_text(encoding="utf-8")))
    except (FileNotFoundError, ValueError):  # ValueError: of another version
        return None


def is_locked(run_dir: RunDir) -> bool:
    """True while a process works on the run."""
    try:
        with open(run_dir.lock) as file:
            # A shared lock: two that look at the same time do not see each other.
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except FileNotFoundError:
        return False
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
    owner = None if _flock_decides(run_dir) else read_owner(run_dir)
    if owner is None or owner.has_ended:
        return False
    return owner.is_here or time.time() - owner.renewed < LEASE_S


@contextlib.contextmanager
def run_lock(run_dir: RunDir) -> Iterator[None]:
    """Hold the lock of a run, see above. A driver that is replaced gets SIGTERM.

    Raises:
        ConfigError: another process holds it, or the folder cannot be created.
    """
    make_folder(run_dir.path)
    # The file stays after the run: if it were removed, one process could hold the lock of the
    # removed file, another that of a new one.
    with open(run_dir.lock, "a+") as file:
        claim = _Claim(run_dir, file)
        claim.acquire()
        renewal = threading.Thread(target=claim.keep, name="run-owner", daemon=True)
        renewal.start()
        try:
            yield
        finally:
            claim.ended.set()
            renewal.join(RENEW_S)
            claim.release()


def in_use(run_dir: RunDir, owner: RunOwner | None) -> ConfigError:
    """The refusal of a second driver: the first one is named, if it is known."""
    holder, stop = "another process", "stop it"
    if owner is not None:
        holder = owner.name
        stop = f"stop job {owner.job}" if owner.job else f"stop process {owner.pid}"
    return ConfigError(
        f"{holder} is working on this run",
        place=str(run_dir.path),
        remedy=f"wait for it or {stop}, or give this run a directory of its own with --run-dir",
    )


class _Claim:
    """One driver's claim to a run."""

    def __init__(self, run_dir: RunDir, file: IO[str]) -> None:
        self.run_dir = run_dir
        self.file = file
        # With a token of its own: a driver that gets the process ID of a dead one is another one.
        self.me = RunOwner.of_this_process()
        self.ended = threading.Event()
        self._has_lock = False

    def acquire(self) -> None:
        """Take the run. Raises ConfigError if another driver works on it."""
        local = _flock_decides(self.run_dir)
        deadline = time.monotonic() + _PREDECESSOR_S
        while True:
            lock = self._lock()
            owner = read_owner(self.run_dir)
            if lock == "taken" if local else self._is_held(lock, owner):
                if not self._succeeds(owner) or time.monotonic() > deadline:
                    raise in_use(self.run_dir, owner)
            else:
                self._write()
                if local or self._is_still_mine():
                    return
            time.sleep(_POLL_S)

    def keep(self) -> None:
        """Renew the owner file until ``ended`` is set, or another driver has replaced this one."""
        while not self.ended.wait(RENEW_S):
            with contextlib.suppress(OSError):  # storage that does not answer must not end the run
                owner = read_owner(self.run_dir)
                if owner is not None and owner.token != self.me.token:
                    print(f"{owner.name} has taken this run over: ending", file=sys.stderr)
                    os.kill(os.getpid(), signal.SIGTERM)
                    return
                if not self._has_lock:
                    self._lock()  # a machine that is gone loses its lock sooner or later
                try:
                    self._write()
                except OSError:  # a full disk: the time of the file is enough
                    os.utime(self.run_dir.owner)

    def release(self) -> None:
        """Remove the owner file. The lock goes with the descriptor."""
        with contextlib.suppress(OSError):  # a file that stays is not renewed any more
            owner = read_owner(self.run_dir)
            if owner is not None and owner.token == self.me.token:
                self.run_dir.owner.unlink()

    def _lock(self) -> Lock:
        """Try to lock the file.

        ``is_locked`` holds a shared lock for a moment, so a lock that is held gets some more tries.
        """
        for _ in range(_ATTEMPTS):
            try:
                fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                self._has_lock = True
                return "ours"
            except BlockingIOError:
                time.sleep(_PAUSE_S)
            except OSError as error:
                if error.errno not in _NO_LOCKS:
                    raise
                return "unsupported"
        return "taken"

    def _is_held(self, lock: Lock, owner: RunOwner | None) -> bool:
        """True if another driver works on the run: the table above."""
        if owner is None:
            return lock == "taken"
        if owner.is_here or owner.has_ended:
            return lock == "taken" or not owner.has_ended
        return self._is_renewed(owner)

    def _is_renewed(self, owner: RunOwner) -> bool:
        """True if the owner of another machine renews its file; watches it for up to LEASE_S."""
        seen = _mark(self.run_dir)
        if time.time() - owner.renewed > _LONG_AGO_S:
            return False
        print(f"waiting whether {owner.name} still works on this run", file=sys.stderr, flush=True)
        deadline = time.monotonic() + LEASE_S
        while time.monotonic() < deadline:
            time.sleep(_POLL_S)
            if _mark(self.run_dir) != seen:
                return read_owner(self.run_dir) is not None  # None: it has ended meanwhile
        return False

    def _is_still_mine(self) -> bool:
        time.sleep(_SETTLE_S)
        owner = read_owner(self.run_dir)
        return owner is not None and owner.token == self.me.token

    def _succeeds(self, owner: RunOwner | None) -> bool:
        """True if the owner is an earlier attempt of this job, which the scheduler has ended."""
        if owner is None or not self.me.job:
            return False
        return owner.job == self.me.job and owner.attempt < self.me.attempt

    def _write(self) -> None:
        me = self.me.model_copy(update={"renewed": time.time()})
        write_json(self.run_dir.owner, me.model_dump(mode="json"))


def _flock_decides(run_dir: RunDir) -> bool:
    return mount_of(str(run_dir.path.resolve())).type in LOCAL_TYPES


def _mark(run_dir: RunDir) -> object:
    """Changes with every renewal of the owner file."""
    try:
        with open(run_dir.owner, "rb") as file:
            return file.read(), os.fstat(file.fileno()).st_mtime_ns
    except FileNotFoundError:
        return None


def _system() -> str:
    """Boot and process namespace of this process."""
    boot = _read("/proc/sys/kernel/random/boot_id").strip()
    return f"{boot} {os.readlink('/proc/self/ns/pid')}"


def _start_of(pid: int) -> int:
    """When a process of this machine started (clock ticks since boot); -1 if there is none."""
    # The name, in brackets, may contain anything; field 22 of the whole is 20th of the rest.
    fields = _read(f"/proc/{pid}/stat").rpartition(")")[2].split()
    return -1 if not fields or fields[0] == "Z" else int(fields[19])


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
