"""Prepared data behind an object store, read by two machines through caches of half its size."""

from __future__ import annotations

import os
import shutil
import signal
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from pipeline.data.description import DatasetDescription
from pipeline.data.order import WindowedOrder
from pipeline.layout import RunDir
from tests.cluster import object_store
from tests.cluster.fabric import Fabric, FabricMachine
from tests.cluster.processes import wait_until
from tests.cluster.ray_machines import RayMachines
from tests.cluster.ray_runs import ClusterRun, PreparedJob
from tests.prepare.source_folders import class_tars

EPOCHS = 2
WINDOW = 4  # shards of 20 images: five steps, more than the loader prefetches
CACHE = Path("/tmp/cache")  # on each machine, its own
NAMES = ("n1", "n2")
JOB = f"""
name: small
model: {{channels: [8, 8, 8, 8], depths: [1, 1, 1, 1], columns: 1}}
data: {{images: {{min_side: 16, shard_rows: 20}}}}
stages:
  pretrain:
    {{image_size: 128, epochs: {EPOCHS}, global_batch: 16, precision: fp32, base_lr: 1e-3,
     warmup_epochs: 1, order: windowed, window_shards: {WINDOW},
     eval_every_epochs: {EPOCHS},
     log_every_steps: 5, checkpoint_every_steps: 20, intermediate_supervision: false,
     augment: {{mixup: 0, cutmix: 0}}}}
"""
LOCAL = "cluster: {processes: 2, device: cpu, threads: 1, loader_threads: 1, prefetch_mib: 1}\n"
URL = f"s3://{object_store.BUCKET}/images"


class StoreRay(RayMachines):
    """Its processes read the store through the proxy on their machine."""

    @property
    def environment(self) -> dict[str, str]:
        return super().environment | object_store.ENVIRONMENT


@dataclass(frozen=True)
class StoredJob(PreparedJob):
    """A job whose data was prepared before."""

    @property
    def text(self) -> str:
        return JOB

    def prepare(self) -> None:
        """Prepare 480 training images on the host, in 24 shards."""
        root = class_tars(self.folder / "images", classes=4, count=120, validation=8)
        (self.folder / "local.yaml").write_text(self.text + LOCAL)
        source = (f"data.root={root}", "stages.prepare={}", "stages.pretrain=null")
        self.local(self.prepared.path, *options(source))

    @property
    def prepared(self) -> RunDir:
        return RunDir(self.folder / "prepared")


class Site:
    """Two machines with Ray, a store with the dataset, and the weights of a run on local data."""

    def __init__(self, fabric: Fabric, folder: Path) -> None:
        self.fabric = fabric
        self.folder = folder
        self.job = StoredJob(folder)
        self.ray = StoreRay(folder=folder)
        self.job.prepare()
        dataset = self.job.prepared.dataset("images")
        self.description = DatasetDescription.read(dataset)
        self.reference = RunDir(folder / "reference")
        self.job.local(self.reference.path, *options((f"data.prepared={dataset}",)))
        for name in NAMES:
            fabric.up(name)
        object_store.serve_on(fabric["n1"], dataset.parent)
        self.restart_proxies()
        self.ray.head(fabric["n1"], "--cpus", "1")
        self.ray.join(fabric["n2"], "--cpus", "1")

    def counts(self, name: str) -> Path:
        return self.folder / f"requests-{name}.json"

    def restart_proxies(self, share: float = 0.0) -> None:
        """Empty caches, and proxies that let a share of the requests fail."""
        for name in NAMES:
            machine = self.fabric[name]
            end_proxy(machine)
            machine.run("rm", "-rf", CACHE)
            object_store.proxy_on(machine, "10.77.0.1", self.counts(name), share)

    @property
    def half(self) -> float:
        """Half of the dataset (GiB)."""
        return sum(shard.bytes for shard in self.description.shards()) / 2 / 2**30

    def start(self, name: str, *settings: str) -> ClusterRun:
        run_dir = RunDir(self.folder / name)
        run_dir.path.mkdir(exist_ok=True)
        cache = f"cluster.shard_cache={{local_folder: {CACHE}, max_gib: {self.half:.9f}}}"
        settings = (f"data.prepared={URL}", "cluster.prefetch_mib=1", cache, *settings)
        return ClusterRun.start(
            self.fabric["n1"], self.ray, self.job.on_cluster(), run_dir, *options(settings)
        )


def end_proxy(machine: FabricMachine) -> None:
    for pid in machine.pids("object_store proxy"):
        os.kill(pid, signal.SIGKILL)
    wait_until(lambda: not machine.pids("object_store proxy"), "the end of the proxy")


def options(settings: tuple[str, ...]) -> list[str]:
    return [part for text in settings for part in ("--set", text)]


def weights(run_dir: RunDir) -> bytes:
    return run_dir.weights("pretrain").read_bytes()


@pytest.fixture(scope="module")
def site(fabric: Fabric, shared_folder: Path) -> Site:
    return Site(fabric, shared_folder)


def test_a_stored_dataset_trains_as_a_local_one_and_each_shard_is_fetched_once_per_epoch(
    site: Site,
) -> None:
    run = site.start("stored")
    output = run.finish()
    assert "check data: the same on 2 machines" in output
    assert weights(run.run_dir) == weights(site.reference)
    shards = site.description.splits["train"].shards
    order = WindowedOrder([shard.rows for shard in shards], 0, WINDOW)
    # The first window of the epoch after the last one is announced before the end.
    next_window = set(order.shards(EPOCHS)[:WINDOW].tolist())
    for name in NAMES:
        fetched = object_store.fetches(site.counts(name))
        counts = [fetched.get(shard.file, 0) for shard in shards]
        allowed = [EPOCHS + (number in next_window) for number in range(len(shards))]
        assert all(1 <= count <= most for count, most in zip(counts, allowed, strict=True)), (
            f"{name}: {counts}, allowed {allowed}"
        )
        cached = site.fabric[name].run("du", "-sb", CACHE).stdout.split()[0]
        assert int(cached) <= site.half * 2**30 + 2**16  # the folder itself counts, too
    assert "pretrain: up to date" in site.start("stored").finish()


def test_throttled_and_dropped_requests_do_not_change_the_result(site: Site) -> None:
    site.restart_proxies(share=0.2)
    run = site.start("disturbed")
    run.finish()
    assert weights(run.run_dir) == weights(site.reference)
    for name in NAMES:
        assert set(object_store.faults(site.counts(name))) == {"throttled", "reset", "cut"}


def test_an_order_that_needs_more_than_the_cache_is_refused_before_the_start(site: Site) -> None:
    site.restart_proxies()
    output = site.start("global", "stages.pretrain.order=global").finish(2)
    assert "stages.pretrain.order: 'global' reads every shard all the time" in output
    assert "-> order: windowed, or cluster.shard_cache.max_gib: " in output
    output = site.start("wide", "stages.pretrain.window_shards=7").finish(2)
    assert "stages.pretrain.window_shards: two windows of 7 shards are in use at a time" in output
    assert "-> take fewer, or cluster.shard_cache.max_gib: " in output


def test_another_dataset_at_the_same_place_is_refused(site: Site) -> None:
    """The fingerprint of the dataset is an input of the stage."""
    other = site.folder / "other"
    shutil.copytree(site.job.prepared.dataset("images"), other)
    replace(site.description, fingerprint="0" * 32).write(other)
    output = site.start("stored", f"data.prepared={other}").finish(2)
    assert "would start from scratch, and finished work would be lost" in output
    assert f"input changed: the dataset images ({other})" in output
