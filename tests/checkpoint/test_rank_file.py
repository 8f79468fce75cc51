"""One rank's file: an ordinary safetensors file of the values at the moment of the copy."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file

from pipeline.checkpoint.rank_file import HostCopy, Owned
from pipeline.files import file_digest


def ranges(values: torch.Tensor) -> list[Owned]:
    """Two kinds of values for two ranges of one parameter of 12 elements, and a second one."""
    return [
        ("weight", (3, 4), 4, "master", values[0:5]),
        ("weight", (3, 4), 4, "ema", values[5:10]),
        ("bias", (2,), 0, "master", values[10:12]),
        ("bias", (2,), 0, "ema", values[12:14]),
    ]


def test_the_file_holds_the_values_of_the_moment_of_the_copy(tmp_path: Path) -> None:
    values = torch.randn(14, generator=torch.Generator().manual_seed(0))
    expected = values.clone()
    copy = HostCopy(3, pin_memory=False)
    copy.take(ranges(values))
    values.zero_()  # the next step
    report = copy.write(tmp_path)
    path = tmp_path / "rank-00003.safetensors"
    stored = load_file(path)
    assert torch.equal(torch.cat([*stored.values()]).sort().values, expected.sort().values)
    assert torch.equal(stored["master|weight"], expected[0:5])
    assert torch.equal(stored["ema|bias"], expected[12:14])
    assert report.files == {path.name: {"bytes": path.stat().st_size, "xxh3": file_digest(path)}}
    assert report.kinds == ["master", "ema"]
    assert [(part.name, part.offset, part.length) for part in report.slices] == [
        ("weight", 4, 5),
        ("bias", 0, 2),
    ]
    assert copy.bytes == path.stat().st_size


def test_the_buffer_serves_every_copy_of_one_size(tmp_path: Path) -> None:
    copy = HostCopy(0, pin_memory=False)
    for step in range(3):
        copy.take(ranges(torch.full((14,), float(step))))
        (tmp_path / str(step)).mkdir()
        copy.write(tmp_path / str(step))
        stored = load_file(tmp_path / str(step) / "rank-00000.safetensors")
        assert all(bool((part == step).all()) for part in stored.values())


def test_a_rank_that_owns_nothing_writes_no_file(tmp_path: Path) -> None:
    copy = HostCopy(0, pin_memory=False)
    copy.take([])
    assert copy.write(tmp_path).files == {}
    assert not list(tmp_path.iterdir())
