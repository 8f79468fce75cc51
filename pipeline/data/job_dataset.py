"""Opens the dataset of a stage, wherever the job says that it lies."""

from __future__ import annotations

from pathlib import Path

from pipeline.config import job_queries
from pipeline.config.job_queries import dataset_place
from pipeline.config.schema import Job, ShardCacheConfig, TrainConfig
from pipeline.data.dataset import PreparedDataset, open_dataset
from pipeline.data.description import DatasetDescription
from pipeline.data.remote_shards import NPY_HEADER_BYTES, read_description
from pipeline.data.shard_cache import ShardCache
from pipeline.data.shards import INDEX_ROWS
from pipeline.errors import ConfigError
from pipeline.layout import RunDir

GIB = 1 << 30


def open_job_dataset(
    job: Job, run_dir: RunDir, stage: str, *, whole: bool = True
) -> PreparedDataset:
    """Open the dataset that a stage uses; one behind a URL through the cache of this machine.

    Args:
        whole: as for `open_dataset`.

    Raises:
        DataError: as `open_dataset`. StageError: the cache cannot be written.
    """
    place = dataset_place(job, run_dir, job_queries.dataset_name(job, stage))
    cache = job.cluster.shard_cache
    if isinstance(place, Path) or cache is None:
        return open_dataset(place, whole=whole)
    folder = Path(cache.local_folder).expanduser()
    return open_dataset(place, cache=ShardCache(folder, int(cache.max_gib * GIB)), whole=whole)


def require_cache_room(job: Job, run_dir: RunDir) -> None:
    """Refuse a training that would download its shards again and again.

    Raises:
        ConfigError: the cache is smaller than what the order of a stage reads at a time.
        DataError: the dataset's description cannot be read.
    """
    cache = job.cluster.shard_cache
    for stage in job_queries.training_stages(job):
        place = dataset_place(job, run_dir, job_queries.dataset_name(job, stage))
        if isinstance(place, str) and cache is not None:
            config = job_queries.train_config(job, stage)
            _require_room(stage, config, read_description(place), cache)


def _require_room(
    stage: str, config: TrainConfig, description: DatasetDescription, cache: ShardCacheConfig
) -> None:
    shards = list(description.shards())
    # The indexes stay in the cache as long as the dataset is open.
    indexes = sum(NPY_HEADER_BYTES + 8 * INDEX_ROWS * shard.rows for shard in shards)
    room = int(cache.max_gib * GIB) - indexes
    total = sum(shard.bytes for shard in shards)
    if total <= room:
        return
    remedy = f"cluster.shard_cache.max_gib: {(total + indexes) / GIB:.1f}"
    if config.order == "global":
        raise ConfigError(
            f"'global' reads every shard all the time, and the cache holds {cache.max_gib:g} of "
            f"{(total + indexes) / GIB:.3g} GiB: most images would be downloaded with their whole "
            "shard",
            place=f"stages.{stage}.order",
            remedy=f"order: windowed, or {remedy}",
        )
    # Which shards form a window differs from epoch to epoch: assume the largest ones.
    sizes = sorted((shard.bytes for shard in description.splits["train"].shards), reverse=True)
    windows = sum(sizes[: 2 * config.window_shards])
    if windows > room:
        raise ConfigError(
            f"two windows of {config.window_shards} shards are in use at a time and take up to "
            f"{(windows + indexes) / GIB:.3g} GiB, the cache holds {cache.max_gib:g}",
            place=f"stages.{stage}.window_shards",
            remedy=f"take fewer, or {remedy}",
        )
