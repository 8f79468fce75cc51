"""One shard: an ordinary Parquet file whose images lie uncompressed in it, and an index of where each one is.

Columns: key, label, width, height, hash (of the image's bytes), and image, which is a struct of bytes and path, as Hugging
Face `datasets` keeps pictures: with the metadata entry ``huggingface`` it decodes and shows them. ``path`` is empty
(the key is the name). PLAIN encoding without compression, dictionary or statistics, one data page for the images of a row
group: so an image is a contiguous stretch of the file, which a reader can map and slice without copying. The index
(``.idx``, NumPy format) is int64 of shape (4, rows): offset, length, label, xxh3-64 of the image.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import xxhash
from numpy.typing import NDArray

from pipeline.errors import DataError
from pipeline.files import atomic, file_digest, write_with

FORMAT = 2  # of a dataset's files
GROUP_ROWS = 256
INDEX_ROWS = 4
# What `datasets` takes for a picture: both this type, nullable as it stands here, and the name in the metadata.
PICTURE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
_FEATURES = json.dumps({"info": {"features": {"image": {"_type": "Image"}}}})
_BYTES = "image.bytes"


@dataclass(frozen=True)
class Row:
    """One labelled image. ``hash``: xxh3-128 of ``image``, in hexadecimal; sizes in pixels."""

    key: str
    label: int
    width: int
    height: int
    hash: str
    image: bytes


@dataclass(frozen=True)
class ShardInfo:
    """What dataset.json says of a shard; sizes in bytes, digests xxh3-128 of the whole files."""

    file: str
    rows: int
    bytes: int
    digest: str
    index_digest: str

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def index_path(shard: Path) -> Path:
    return shard.with_suffix(".idx")


def schema() -> pa.Schema:
    fields = [("key", pa.string()), ("label", pa.int32()), ("width", pa.int32())]
    fields += [("height", pa.int32()), ("hash", pa.string())]
    return pa.schema(
        [
            *(pa.field(name, kind, nullable=False) for name, kind in fields),
            pa.field("image", PICTURE),
        ]
    )


def write_shard(path: Path, groups: Iterable[Sequence[Row]], fingerprint: str) -> ShardInfo:
    """Write a shard and its index, both complete or not at all; the same rows give the same bytes.

    Args:
        groups: the rows in their order, in groups of at most GROUP_ROWS, one group in memory at a time.
        fingerprint: of the dataset; kept in the file's metadata.
    Raises:
        DataError: the file does not read back as written (a disk or library fault).
    """
    lengths: list[int] = []
    labels: list[int] = []
    digests: list[int] = []

    def write(temporary: Path) -> None:
        layout = schema()
        encodings = dict.fromkeys([*layout.names[:-1], _BYTES, "image.path"], "PLAIN")
        with pq.ParquetWriter(
            temporary,
            layout,
            compression="NONE",
            use_dictionary=False,
            column_encoding=encodings,
            write_statistics=False,
            data_page_size=1 << 30,
            data_page_version="1.0",
            store_schema=False,
        ) as writer:
            writer.add_key_value_metadata({"fingerprint": fingerprint, "huggingface": _FEATURES})
            for rows in groups:
                writer.write_table(_table(rows, layout), row_group_size=GROUP_ROWS)
                lengths.extend(len(row.image) for row in rows)
                labels.extend(row.label for row in rows)
                digests.extend(xxhash.xxh3_64_intdigest(row.image) for row in rows)

    write_with(path, write)
    hashed = np.array(digests, dtype=np.uint64).view(np.int64)
    index = np.array([_offsets(path, lengths), lengths, labels, hashed], dtype=np.int64).reshape(
        INDEX_ROWS, len(lengths)
    )
    with atomic(index_path(path)) as file:
        np.save(file, index)
    return ShardInfo(
        path.name,
        len(lengths),
        path.stat().st_size,
        file_digest(path),
        file_digest(index_path(path)),
    )


def _table(rows: Sequence[Row], layout: pa.Schema) -> pa.Table:
    columns = [
        pa.array([getattr(row, field.name) for row in rows], type=field.type)
        for field in list(layout)[:-1]
    ]
    images = pa.array([row.image for row in rows], type=pa.binary())
    pictures = pa.StructArray.from_arrays(
        [images, pa.nulls(len(rows), pa.string())], fields=list(PICTURE)
    )
    return pa.table([*columns, pictures], schema=layout)


def _offsets(path: Path, lengths: Sequence[int]) -> NDArray[np.int64]:
    """Where each image's bytes begin in the file: int64 (rows,).

    A PLAIN page of byte arrays is, for each value, its length in 4 little-endian bytes and its bytes; what comes before it
    in the column chunk is the page's header and a few bytes that say that no value is missing. Every length is checked in
    the file, the contents of the first and the last image of each end against what pyarrow reads.
    """
    metadata = pq.read_metadata(path)
    column = next(
        i for i in range(metadata.num_columns) if metadata.schema.column(i).path == _BYTES
    )
    sizes = np.asarray(lengths, dtype=np.int64)
    offsets = np.zeros(len(sizes), dtype=np.int64)
    content = np.memmap(path, dtype=np.uint8, mode="r")
    first = 0
    for group in range(metadata.num_row_groups):
        chunk = metadata.row_group(group).column(column)
        last = first + metadata.row_group(group).num_rows
        taken = sizes[first:last] + 4
        end = chunk.data_page_offset + chunk.total_compressed_size
        offsets[first:last] = end - np.cumsum(taken[::-1])[::-1] + 4
        prefixes = (
            content[(offsets[first:last, None] + np.arange(-4, 0))]
            .reshape(-1, 4)
            .copy()
            .view("<u4")[:, 0]
        )
        if not np.array_equal(prefixes, sizes[first:last]):
            raise _unreadable(path, f"row group {group}")
        first = last
    for group in {0, metadata.num_row_groups - 1} if len(sizes) else set():
        _compare(path, group, offsets, sizes, content)
    return offsets


def _compare(
    path: Path,
    group: int,
    offsets: NDArray[np.int64],
    sizes: NDArray[np.int64],
    content: np.memmap[Any, Any],
) -> None:
    images = pq.ParquetFile(path).read_row_group(group, columns=[_BYTES])["image"]
    start = 0 if group == 0 else len(sizes) - len(images)
    for row in (0, len(images) - 1):
        offset, size = int(offsets[start + row]), int(sizes[start + row])
        if images[row]["bytes"].as_py() != content[offset : offset + size].tobytes():
            raise _unreadable(path, f"row {start + row}")


def _unreadable(path: Path, where: str) -> DataError:
    return DataError(
        f"{where} does not read back as it was written",
        place=str(path),
        remedy="check the disk, then prepare the data again",
    )
