"""A benchmark names its missing packages before it measures anything."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from pipeline.bench import loader
from pipeline.bench.requirements import require
from pipeline.errors import ConfigError


class Blocker:
    """An import finder that refuses one package."""

    def __init__(self, package: str) -> None:
        self.package = package

    def find_spec(self, name: str, path: object = None, target: object = None) -> None:
        if name.partition(".")[0] == self.package:
            raise ImportError(f"{name} is blocked")


def block(monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    monkeypatch.delitem(sys.modules, package, raising=False)
    monkeypatch.setattr(sys, "meta_path", [Blocker(package), *sys.meta_path])


def test_installed_packages_are_accepted() -> None:
    require("loader", ["numpy", "torch"])


def test_all_missing_packages_are_named_with_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    block(monkeypatch, "webdataset")
    with pytest.raises(ConfigError) as caught:
        require("loader", ["numpy", "webdataset", "no_such_package"])
    assert caught.value.message == (
        "bench loader: needs packages that are not installed: webdataset, no_such_package\n"
        "  -> pip install 'revcol-pipeline[bench]'"
    )


def test_bench_loader_fails_before_it_prepares_images(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def no_images(*_: object) -> None:
        pytest.fail("images were prepared although a package is missing")

    monkeypatch.setattr(loader, "prepare_sources", no_images)
    block(monkeypatch, "webdataset")
    with pytest.raises(ConfigError, match="not installed: webdataset"):
        loader.main(tmp_path / "loader.json")
    assert not (tmp_path / "loader.json").exists()


def test_bench_loader_needs_only_the_packages_of_its_loaders(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Reached(Exception):
        pass

    def reached(*_: object) -> None:
        raise Reached

    monkeypatch.setattr(loader, "prepare_sources", reached)
    block(monkeypatch, "webdataset")
    with pytest.raises(Reached):
        loader.main(loaders=("ours", "pillow"))
