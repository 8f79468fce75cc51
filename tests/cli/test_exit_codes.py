"""Exit codes: 0, 2 (input), 3 (stage), 70 (bug), 75 (stopped), 130 (ended at once)."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.cli import entry_point
from pipeline.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    Interrupted,
    PipelineError,
    StageError,
)

ROOT = Path(__file__).resolve().parents[2]


def pipeline(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """``python -m pipeline`` in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "pipeline", *arguments],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )


def exit_code(error: BaseException, monkeypatch: pytest.MonkeyPatch) -> object:
    """The exit code of ``main`` for an exception that a command raises."""

    def explain(*arguments: object) -> str:
        raise error

    monkeypatch.setattr("pipeline.config.render.explain", explain)
    monkeypatch.setattr(sys, "argv", ["pipeline", "explain", "seed"])
    with pytest.raises(SystemExit) as end:
        entry_point.main()
    return end.value.code


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "no_such_job"], "neither a job file nor a shipped job has this name"),
        (["missing.yaml"], "missing.yaml"),
        (["run", "quickstart", "--dry-run", "--set", "sed=1"], "did you mean 'seed'"),
        (["data", "show", "nothing"], "is no job file, run or prepared dataset"),
        (["verify", "nothing"], "no prepared dataset here"),
        (["predict", "nothing", "a.jpg"], "is neither a run nor an exported model"),
    ],
)
def test_wrong_input_is_2(tmp_path: Path, arguments: list[str], message: str) -> None:
    done = pipeline(tmp_path, *arguments)
    assert done.returncode == 2, done.stderr
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []  # nothing was started


@pytest.mark.parametrize(
    "arguments", [["run"], ["no_such_command"], ["run", "quickstart", "--no-such-option"]]
)
def test_wrong_usage_is_2(tmp_path: Path, arguments: list[str]) -> None:
    done = pipeline(tmp_path, *arguments)
    assert done.returncode == 2
    assert "Usage: " in done.stderr


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ConfigError("wrong"), 2),
        (DataError("wrong"), 2),
        (StageError("wrong"), 3),
        (CheckpointError("wrong"), 3),
        (PipelineError("wrong"), 3),
        (Interrupted("wrong"), 75),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_errors_for_the_user_exit_with_their_code_and_without_a_traceback(
    error: PipelineError,
    code: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert exit_code(error, monkeypatch) == code
    shown = capsys.readouterr().err
    assert "wrong" in shown
    assert "Traceback" not in shown


def test_any_other_exception_is_a_bug_with_code_70(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert exit_code(ZeroDivisionError("planted"), monkeypatch) == 70
    shown = capsys.readouterr().err
    assert "ZeroDivisionError: planted" in shown
    assert "this is a bug of the pipeline: please report the lines above" in shown


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_3_with_a_remedy(
    number: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert exit_code(OSError(number, os.strerror(number), "/data/x"), monkeypatch) == 3
    shown = capsys.readouterr().err
    assert "error: /data/x: the disk is full" in shown
    assert "  -> free some space, then rerun the same command to resume" in shown


def test_ctrl_c_is_130_and_says_how_to_resume(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert exit_code(KeyboardInterrupt(), monkeypatch) == 130
    assert "rerun the same command to resume from the last checkpoint" in capsys.readouterr().err


@pytest.mark.parametrize("place", ["a link to nowhere", "a file", "below a file"])
def test_a_run_directory_that_cannot_be_created_is_named(place: str, tmp_path: Path) -> None:
    run_dir = tmp_path / "runs"
    if place == "a link to nowhere":
        os.symlink("/nowhere/at/all", run_dir)
        run_dir = run_dir / "quickstart"
    else:
        run_dir.write_text("")
        run_dir = run_dir / "quickstart" if place == "below a file" else run_dir
    done = pipeline(tmp_path, "run", "quickstart", "--run-dir", str(run_dir))
    assert done.returncode == 2, done.stderr
    assert f"{run_dir}: cannot be created" in done.stderr
    assert "--run-dir" in done.stderr


def test_an_output_that_may_not_be_written_is_bad_input(monkeypatch: pytest.MonkeyPatch) -> None:
    for number in (errno.EACCES, errno.EROFS, errno.ENOTDIR):
        assert exit_code(OSError(number, os.strerror(number), "/data.png"), monkeypatch) == 2
