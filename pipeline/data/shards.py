"""Shard format: a standard Parquet file with uncompressed images, and an index of their offsets.

Standard readers (pyarrow, DuckDB, Ray Data, Hugging Face `datasets`) read a shard like any other
Parquet file. The loader does not parse Parquet at all: it maps the file and slices each image out
of it without a copy, with the offsets of the index.

Columns: key, label, width, height, hash (of the image's bytes) and image. The image is a struct of
bytes and path, the form in which `datasets` stores images; with the metadata entry ``huggingface``
it decodes and shows them. ``path`` is always null, because the key is the name.

Why an image is one contiguous range of the file: the column ``image.bytes`` has PLAIN encoding, no
compression, no dictionary, no statistics, and one data page per row group. Example: one row group
of two images, b"abc" and b"hello". The column chunk of ``image.bytes`` covers bytes 213 to 253::

    offset  bytes
       213  19      page header
       232   6      definition levels (no value is null), run-length encoded
       238   4      length of image 0: 3, little-endian
       242   3      abc
       245   4      length of image 1: 5
       249   5      hello
       254          end of the column chunk

The index (``.idx``, NumPy format) is int64 of shape (4, rows): offset, length, label and xxh3-64 of
each image. Here its first two rows are [242, 249] and [3, 5].
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import xxhash
from numpy.typing import NDArray

from pipeline.errors import DataError
from pipeline.files import atomic, file_digest, write_with

Int64 = NDArray[np.int64]
Index = NDArray[np.int64]  # shape (INDEX_ROWS, rows), see above

FORMAT = 2  # version of a dataset's files
GROUP_ROWS = 256  # rows per row group, at most
INDEX_ROWS = 4  # offset, length, label, hash
LENGTH_BYTES = 4  # a PLAIN byte array starts with its length as uint32
PAGE_BYTES = 1 << 30  # larger than any row group: its images stay in one data page

# `datasets` recognises images by both: this type, nullable as it is here, and the metadata entry.
IMAGE_STRUCT = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
_FEATURES = json.dumps({"info": {"features": {"image": {"_type": "Image"}}}})
_IMAGE_BYTES = "image.bytes"


@dataclass(frozen=True, kw_only=True)
class Row:
    """One labelled image. ``width`` and ``height`` in pixels; ``hash``: xxh3-128 of ``image``."""

    key: str
    label: int
    width: int
    height: int
    hash: str
    image: bytes


@dataclass(frozen=True, kw_only=True)
class ShardInfo:
    """A shard as ``dataset.json`` lists it: name, rows, size in bytes, digests of both files."""

    file: str
    rows: int
    bytes: int
    digest: str
    index_digest: str


def index_path(shard: Path) -> Path:
    """The index of a shard: ``train-00000.parquet`` -> ``train-00000.idx``."""
    return shard.with_suffix(".idx")


def schema() -> pa.Schema:
    """Arrow schema of a shard."""
    columns = [
        ("key", pa.string()),
        ("label", pa.int32()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("hash", pa.string()),
    ]
    fields = [pa.field(name, kind, nullable=False) for name, kind in columns]
    return pa.schema([*fields, pa.field("image", IMAGE_STRUCT)])


@dataclass
class _Written:
    """Length, label and xxh3-64 of each image, collected while the rows are written."""

    lengths: list[int] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    hashes: list[int] = field(default_factory=list)

    def add(self, rows: Sequence[Row]) -> None:
        self.lengths.extend(len(row.image) for row in rows)
        self.labels.extend(row.label for row in rows)
        self.hashes.extend(xxhash.xxh3_64_intdigest(row.image) for row in rows)


def write_shard(path: Path, groups: Iterable[Sequence[Row]], fingerprint: str) -> ShardInfo:
    """Write a shard and its index, each complete or not at all; the same rows give the same bytes.

    Args:
        groups: the rows in order, in groups of at most GROUP_ROWS; one is in memory at a time.
        fingerprint: fingerprint of the dataset, stored in the file's metadata.
    Raises:
        DataError: the file does not read back as written (a fault of the disk or of a library).
        OSError: a file cannot be written.
    """
    written = _Written()
    write_with(path, lambda temporary: _write_parquet(temporary, groups, fingerprint, written))
    # The offsets are read from the finished file: pyarrow does not report them while writing.
    offsets = _offsets(path, written.lengths)
    hashes = np.array(written.hashes, dtype=np.uint64).view(np.int64)
    rows = len(written.lengths)
    index = np.array([offsets, written.lengths, written.labels, hashes], dtype=np.int64)
    with atomic(index_path(path)) as file:
        np.save(file, index.reshape(INDEX_ROWS, rows))
    return ShardInfo(
        file=path.name,
        rows=rows,
        bytes=path.stat().st_size,
        digest=file_digest(path),
        index_digest=file_digest(index_path(path)),
    )


def _write_parquet(
    path: Path, groups: Iterable[Sequence[Row]], fingerprint: str, written: _Written
) -> None:
    layout = schema()
    # Every option that affects where an image's bytes lie is set here: the defaults of Parquet
    # (compression, dictionaries, pages of about 1 MiB) would transform or split them.
    with pq.ParquetWriter(
        path,
        layout,
        compression="NONE",
        use_dictionary=False,
        column_encoding=dict.fromkeys([*layout.names[:-1], _IMAGE_BYTES, "image.path"], "PLAIN"),
        write_statistics=False,
        data_page_size=PAGE_BYTES,
        data_page_version="1.0",
        store_schema=False,
    ) as writer:
        writer.add_key_value_metadata({"fingerprint": fingerprint, "huggingface": _FEATURES})
        for rows in groups:
            writer.write_table(_table(rows, layout), row_group_size=GROUP_ROWS)
            written.add(rows)


def _table(rows: Sequence[Row], layout: pa.Schema) -> pa.Table:
    columns = [
        pa.array([getattr(row, column.name) for row in rows], type=column.type)
        for column in list(layout)[:-1]
    ]
    contents = pa.array([row.image for row in rows], type=pa.binary())
    paths = pa.nulls(len(rows), pa.string())
    images = pa.StructArray.from_arrays([contents, paths], fields=list(IMAGE_STRUCT))
    return pa.table([*columns, images], schema=layout)


def _offsets(path: Path, lengths: Sequence[int]) -> Int64:
    """Offset of each image's bytes in the file: int64, shape (rows,).

    Computed backwards from the end of each column chunk, where the page header, whose size varies,
    does not matter. In the example of the module: the chunk ends at 254 and the values take 3 + 4
    and 5 + 4 bytes, so value 1 starts at 254 - 9 = 245 and value 0 at 254 - 16 = 238; the images
    start 4 bytes later, at 249 and 242.

    Every length is compared with the length stored in the file. The content is compared with
    pyarrow's reading for the first and last image of the first and last row group.

    Raises:
        DataError: a comparison fails.
    """
    metadata = pq.read_metadata(path)
    columns = [metadata.schema.column(i).path for i in range(metadata.num_columns)]
    column = columns.index(_IMAGE_BYTES)
    sizes = np.asarray(lengths, dtype=np.int64)
    offsets = np.zeros(len(sizes), dtype=np.int64)
    content = np.memmap(path, dtype=np.uint8, mode="r")
    first = 0
    for group in range(metadata.num_row_groups):
        # Rows [first, last) of the shard are this row group; `end` is 254 in the example.
        last = first + metadata.row_group(group).num_rows
        chunk = metadata.row_group(group).column(column)
        end = chunk.data_page_offset + chunk.total_compressed_size
        stored_bytes = sizes[first:last] + LENGTH_BYTES  # [7, 9]
        bytes_to_end = np.cumsum(stored_bytes[::-1])[::-1]  # [16, 9]: each value and those after it
        offsets[first:last] = end - bytes_to_end + LENGTH_BYTES
        if not np.array_equal(_stored_lengths(content, offsets[first:last]), sizes[first:last]):
            raise _does_not_read_back(path, f"row group {group}")
        first = last
    for group in {0, metadata.num_row_groups - 1} if len(sizes) else set():
        _compare(path, group, offsets, sizes, content)
    return offsets


def _stored_lengths(content: NDArray[np.uint8], offsets: Int64) -> NDArray[np.uint32]:
    """The lengths stored in front of the images at ``offsets``: uint32, shape (rows,)."""
    prefixes = content[offsets[:, None] + np.arange(-LENGTH_BYTES, 0)]
    values: NDArray[np.uint32] = prefixes.reshape(-1, LENGTH_BYTES).copy().view("<u4")[:, 0]
    return values


def _compare(
    path: Path, group: int, offsets: Int64, sizes: Int64, content: NDArray[np.uint8]
) -> None:
    """Compare the first and last image of a row group with pyarrow's reading. Raises DataError."""
    images = pq.ParquetFile(path).read_row_group(group, columns=[_IMAGE_BYTES])["image"]
    start = 0 if group == 0 else len(sizes) - len(images)  # group is the first or the last one
    for row in (0, len(images) - 1):
        offset = int(offsets[start + row])
        size = int(sizes[start + row])
        if images[row]["bytes"].as_py() != content[offset : offset + size].tobytes():
            raise _does_not_read_back(path, f"row {start + row}")


def _does_not_read_back(path: Path, where: str) -> DataError:
    return DataError(
        f"{where} does not read back as written",
        place=str(path),
        remedy="check the disk, then rerun the same command",
    )
