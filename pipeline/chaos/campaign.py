"""Runs a job twice, once disturbed by faults at random, and compares the results bit for bit."""

from __future__ import annotations

import contextlib
import random
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from pipeline.chaos.cluster_driver import ClusterDriver, OnCluster
from pipeline.chaos.cluster_faults import cluster_faults
from pipeline.chaos.driver import END_S, Driver
from pipeline.chaos.faults import Fault
from pipeline.chaos.local_driver import LocalDriver
from pipeline.chaos.local_faults import local_faults
from pipeline.chaos.own_disk import own_disk
from pipeline.errors import Interrupted, StageError
from pipeline.files import file_digest, write_json
from pipeline.layout import RunDir
from pipeline.reporting import Log

# Of a disturbed run: neither changes a result. Every step is logged, so that progress shows.
_SETTINGS = ("cluster.hang_timeout=60", "cluster.collective_timeout=300", "cluster.grace=60")
_NEW_STEPS = 2  # after a fault, before the next one
_PROGRESS_S = 900.0  # without a step, the run has not recovered
_END_S = 3600.0 * 24
_TRIES = 4  # calls in a row that end without a step in between
_LEFT_S = 60.0  # until the processes of an ended driver have ended, too
_ROOM = 4  # size of the disk, as a multiple of the undisturbed run


@dataclass(kw_only=True)
class InjectedFault:
    """A fault that was made. ``step``: steps of all stages before; ``lost``: steps done again."""

    fault: str
    text: str
    step: int
    lost: int = 0
    seconds: float = 0.0  # until there were new steps


@dataclass(kw_only=True)
class Campaign:
    """A job, and what is done to it.

    Attributes:
        arguments: of ``run``: the job and its overrides.
        stages: the training stages.
        folder: of both runs.
        faults, seed: how many, and of which random numbers.
        log: logs a message for the user.
        cluster: where both runs are; None: on this machine.
    """

    arguments: Sequence[str]
    stages: Sequence[str]
    folder: Path
    faults: int
    seed: int
    log: Log
    cluster: OnCluster | None = None
    events: list[InjectedFault] = field(default_factory=list)

    def run(self) -> None:
        """Run the job twice.

        Raises:
            StageError: a run failed, or the results differ.
        """
        undisturbed = self._driver("undisturbed")
        self.log("an undisturbed run, to compare with")
        with self._ended(undisturbed):
            undisturbed.start()
            if not undisturbed.wait_until(lambda: False, _END_S) and undisturbed.wait(END_S) != 0:
                raise self._failed(undisturbed, "the undisturbed run failed")
            undisturbed.poll()
        # A cluster may keep its runs where this machine looks for others.
        if not undisturbed.reached:
            raise self._failed(undisturbed, f"no step of it is seen in {undisturbed.run_dir.path}")
        with self._disturbed(undisturbed) as (disturbed, kinds):
            with self._ended(disturbed):
                self._disturb(disturbed, kinds, total=undisturbed.reached)
            different = self._differences(undisturbed.run_dir, disturbed.run_dir)
        self._write(different)
        if different:
            raise StageError(f"the results differ: {', '.join(different)}", place=str(self.folder))
        if len(self.events) < self.faults:
            raise StageError(
                f"the job was done after {len(self.events)} of {self.faults} faults",
                place=str(self.folder),
                remedy="ask for fewer faults, or take a longer job",
            )

    @contextlib.contextmanager
    def _disturbed(self, undisturbed: Driver) -> Iterator[tuple[Driver, list[Fault]]]:
        """The run that is disturbed, and how it can be."""
        driver = self._driver("disturbed")
        if isinstance(driver, ClusterDriver):
            yield driver, cluster_faults(driver)
            return
        assert isinstance(driver, LocalDriver)
        # Enough for a run, and little enough to be filled in a moment.
        size = sum(path.stat().st_size for path in undisturbed.run_dir.path.rglob("*"))
        with own_disk(self.folder / "disturbed", _ROOM * size) as has_disk:
            if not has_disk:
                self.log("no disk is filled: a file system of its own needs root", "warning")
            try:
                yield driver, local_faults(driver, has_disk=has_disk)
            finally:
                # The disk is gone afterwards, and with it what a report needs.
                logs = driver.run_dir.logs
                if logs.exists():
                    shutil.copytree(logs, self.folder / "disturbed-logs", dirs_exist_ok=True)

    def _driver(self, name: str) -> Driver:
        settings = [*_SETTINGS, *(f"stages.{stage}.log_every_steps=1" for stage in self.stages)]
        settings += self.cluster.settings if self.cluster else []
        overrides = [word for setting in settings for word in ("--set", setting)]
        log = self.folder / f"{name}.txt"
        arguments = [*self.arguments, *overrides]
        if self.cluster is not None:
            # Beside the folder: a cluster keeps its runs by name.
            run = f"{self.folder.name}-{name}"
            return self.cluster.driver(arguments, self.folder.with_name(run), self.stages, log)
        run_dir = RunDir(self.folder / name / "run")
        return LocalDriver(
            arguments=[*arguments, "--run-dir", str(run_dir.path)],
            run_dir=run_dir,
            stages=self.stages,
            log=log,
        )

    def _disturb(self, driver: Driver, kinds: Sequence[Fault], total: int) -> None:
        """Run the job to its end, with faults on its way."""
        choices = random.Random(self.seed)
        # So that the last fault still finds some steps left.
        widest = max(1, total // (self.faults + 1))
        driver.start()
        for _ in range(self.faults):
            # Each fault waits for new steps after the one before.
            wanted = driver.reached + choices.randint(1, widest)
            if not self._get_to(driver, wanted) or not self._make(driver, kinds, choices):
                break
        self._get_to(driver, None)

    def _make(self, driver: Driver, kinds: Sequence[Fault], choices: random.Random) -> bool:
        """Make a fault and wait for a new step; False if the job is done before."""
        text = ""
        while not text:  # a kind may be impossible between two groups of processes
            if not self._keep_running(driver):
                return False
            fault = choices.choice(kinds)
            before = driver.poll()
            began = time.monotonic()
            text = fault.apply(choices)
            if not text:
                time.sleep(1)
        self.log(f"fault {len(self.events) + 1} of {self.faults} after step {before}: {text}")
        event = InjectedFault(fault=fault.name, text=text, step=before)
        self.events.append(event)
        driver.poll()
        # What was on its way when the fault was made is no progress yet.
        wanted = driver.reached + _NEW_STEPS
        lowest = before
        deadline = time.monotonic() + _PROGRESS_S
        while self._keep_running(driver) and driver.reached < wanted:
            lowest = min(lowest, driver.poll())
            if time.monotonic() > deadline:
                raise self._failed(driver, f"no new step within {_PROGRESS_S:g} s after: {text}")
            time.sleep(0.2)
        event.lost = before - lowest
        event.seconds = time.monotonic() - began
        return True

    def _get_to(self, driver: Driver, step: int | None) -> bool:
        """Run until a step (None: the end); False if the job is done before."""
        while self._keep_running(driver):
            driver.poll()
            if step is not None and driver.reached >= step:
                return True
            time.sleep(0.2)
        return False

    def _keep_running(self, driver: Driver) -> bool:
        """Start the driver again if it has ended too early; False once the job is done.

        Raises:
            StageError: it ends again and again, or leaves processes behind.
        """
        code = driver.code
        if code is None:
            return True
        if code == 0:
            return False
        # -9: it was killed. The others are the ends that promise that a second call resumes.
        if code not in (Interrupted.exit_code, StageError.exit_code, -9):
            raise self._failed(driver, f"the disturbed run ended with exit code {code}")
        self._require_nothing_left(driver)
        # Each fault may cost some starts; more of them are a loop.
        if driver.starts > len(self.events) + _TRIES:
            raise self._failed(driver, f"it ends again and again (exit code {code})")
        driver.start()
        return True

    @contextlib.contextmanager
    def _ended(self, driver: Driver) -> Iterator[None]:
        """No process of the driver is left afterwards, also if chaos itself is ended."""
        try:
            yield
        finally:
            driver.end()
            self._require_nothing_left(driver)

    def _require_nothing_left(self, driver: Driver) -> None:
        deadline = time.monotonic() + _LEFT_S
        while left := driver.left_processes():
            if time.monotonic() > deadline:
                pids = ", ".join(str(process.pid) for process in left)
                raise self._failed(driver, f"processes of an ended driver are left: {pids}")
            time.sleep(0.5)

    def _differences(self, undisturbed: RunDir, disturbed: RunDir) -> list[str]:
        """Result files that differ."""
        paths = [run.path for run in (undisturbed, disturbed)]
        # Weights and exports: logs and times differ in any two runs.
        names = {
            str(path.relative_to(run))
            for run in paths
            for pattern in ("stages/*/weights.safetensors", "export/*.safetensors")
            for path in run.glob(pattern)
        }
        return sorted(
            name
            for name in names
            if not all((run / name).exists() for run in paths)
            or len({file_digest(run / name) for run in paths}) > 1
        )

    def _write(self, different: Sequence[str]) -> None:
        write_json(
            self.folder / "chaos.json",
            {
                "seed": self.seed,
                "faults": [asdict(event) for event in self.events],
                "different": list(different),
            },
        )

    def _failed(self, driver: Driver, cause: str) -> StageError:
        return StageError(cause, place=str(driver.log))
