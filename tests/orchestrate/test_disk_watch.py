"""A run whose files cannot be written says so on the terminal of its driver."""

from __future__ import annotations

from pathlib import Path

from pipeline.layout import RunDir
from pipeline.orchestrate.disk_watch import watched_disk
from tests.orchestrate.supervised import wait_until


def test_files_that_cannot_be_written_are_named_once(tmp_path: Path) -> None:
    run_dir = RunDir(tmp_path)
    run_dir.logs.mkdir()
    messages: list[str] = []

    def log(text: str, level: str = "info") -> None:
        messages.append(f"{level}: {text}")

    with watched_disk(run_dir, log, period_s=0.02):
        assert not wait_until(lambda: bool(messages), 0.3)
        run_dir.logs.rename(tmp_path / "elsewhere")
        assert wait_until(lambda: bool(messages), 10)
        assert not wait_until(lambda: len(messages) > 1, 0.3)
        (tmp_path / "elsewhere").rename(run_dir.logs)
        assert wait_until(lambda: len(messages) > 1, 10)
    warning, info = messages
    assert warning.startswith(f"warning: {tmp_path} cannot be written: No such file or directory; ")
    assert info == f"info: {tmp_path} can be written again"
    assert wait_until(lambda: not run_dir.probe.exists(), 10)
