"""URLs whose package is not installed: the error names the way to install it."""

from __future__ import annotations

import sys

import pytest
from fsspec.registry import _registry

from pipeline.errors import DataError
from pipeline.sources.remote import open_storage


def hide(package: str, protocol: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make importing a package fail, also if fsspec has loaded it before."""
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.delitem(_registry, protocol, raising=False)


def test_an_s3_url_without_s3fs_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    hide("s3fs", "s3", monkeypatch)
    with pytest.raises(DataError) as raised:
        open_storage("s3://bucket/images")
    message = raised.value.message
    assert message.startswith("s3://bucket/images: cannot be opened: ")
    assert "s3fs" in message
    assert "./launch.sh install s3" in message
    assert 'pip install "revcol-pipeline[s3]"' in message
    assert raised.value.exit_code == 2


def test_another_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    hide("gcsfs", "gs", monkeypatch)
    with pytest.raises(DataError, match="gcsfs") as raised:
        open_storage("gs://bucket/images")
    assert "install the package that it names" in raised.value.message


def test_an_unknown_kind_of_url_is_refused() -> None:
    with pytest.raises(DataError) as raised:
        open_storage("no-such-protocol://bucket/images")
    assert "a URL that fsspec supports" in raised.value.message
