"""Commands: names of shipped jobs, short forms, the user's command in texts, start-up imports."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from pipeline import __version__, cli, command
from pipeline.cli import entry_point
from pipeline.errors import ConfigError
from pipeline.orchestrate.job_files import description, find_job_file, shipped_jobs
from pipeline.shipped import JOBS

ROOT = Path(__file__).resolve().parents[2]


def invoke(*arguments: str) -> Result:
    return CliRunner().invoke(cli.app, list(arguments), catch_exceptions=False)


def run_main(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> object:
    """The exit code of ``main`` in this process."""
    monkeypatch.setattr(sys, "argv", ["pipeline", *arguments])
    with pytest.raises(SystemExit) as end:
        entry_point.main()
    return end.value.code or 0


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current folder, far from the shipped jobs."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv(command.VARIABLE, raising=False)
    return tmp_path


def test_a_shipped_job_runs_by_its_name_from_any_folder() -> None:
    by_name = invoke("run", "quickstart", "--dry-run")
    assert by_name.exit_code == 0
    assert by_name.output.startswith("name: quickstart")
    assert by_name.output == invoke("run", str(JOBS / "quickstart.yaml"), "--dry-run").output


@pytest.mark.parametrize("name", ["quickstart", "quickstart.yaml"])
def test_a_file_in_the_current_folder_wins_over_a_shipped_job(folder: Path, name: str) -> None:
    (folder / name).write_text((JOBS / "quickstart.yaml").read_text())
    assert find_job_file("quickstart") == Path(name)
    result = invoke("run", "quickstart", "--dry-run", "--set", "seed=7")
    assert result.exit_code == 0
    assert f"{name}:" in result.output  # the origin of the values


def test_paths_are_never_names_of_shipped_jobs() -> None:
    for path in ("quickstart.yaml", "./quickstart", "jobs/quickstart"):
        assert find_job_file(path) == Path(path)


def test_an_unknown_name_suggests_the_closest_shipped_job() -> None:
    with pytest.raises(ConfigError, match=r"quikstart: neither .*\n  -> did you mean 'quickstart'"):
        find_job_file("quikstart")
    with pytest.raises(ConfigError, match=r"-> shipped jobs: cifar10, .*quickstart"):
        find_job_file("zzzzzzzz")


@pytest.mark.usefixtures("restored_handlers")
def test_every_command_that_takes_a_job_finds_shipped_ones(folder: Path) -> None:
    shown = invoke("explain", "model.columns", "--job", "quickstart")
    assert shown.exit_code == 0
    assert "revcol_quickstart" in shown.output
    with pytest.raises(ConfigError, match="did you mean 'quickstart'"):
        invoke("train", "quickstar", "--stage", "pretrain")
    # data show and train find the job, then report that its data is not prepared.
    for arguments in (
        ["data", "show", "quickstart"],
        ["train", "quickstart", "--stage", "pretrain"],
    ):
        result = CliRunner().invoke(cli.app, arguments)
        assert "runs/quickstart/stages/prepare/toy22k" in str(result.exception)


def test_the_help_of_run_and_its_list_name_the_shipped_jobs() -> None:
    names = shipped_jobs()
    assert "quickstart" in names
    shown = " ".join(invoke("run", "--help").output.split())
    listed = invoke("run", "--list").output
    for name, path in names.items():
        assert name in shown
        assert re.search(rf"^{name} +{re.escape(description(path))}$", listed, re.MULTILINE)


def test_a_job_file_as_first_argument_means_run(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "mine.yaml").write_text((JOBS / "quickstart.yaml").read_text())
    assert run_main(monkeypatch, "mine.yaml", "--dry-run") == 0
    assert capsys.readouterr().out.startswith("name: quickstart")


@pytest.mark.parametrize("typed", ["./launch.sh", "pipeline"])
def test_usage_texts_name_the_command_that_was_typed(
    typed: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if typed != "pipeline":
        monkeypatch.setenv(command.VARIABLE, typed)
    assert run_main(monkeypatch, "run", "--help") == 0
    assert f"Usage: {typed} run " in capsys.readouterr().out


def test_every_command_has_help() -> None:
    shown = invoke("--help").output
    commands = [
        "run",
        "train",
        "runs",
        "verify",
        "predict",
        "schema",
        "explain",
        "tensorboard",
        "test",
    ]
    for name in [*commands, "bench", "data"]:
        assert f" {name} " in shown
        assert invoke(name, "--help").exit_code == 0
    for name in ("reversible", "loader", "prepare"):
        assert invoke("bench", name, "--help").exit_code == 0
    assert invoke("data", "show", "--help").exit_code == 0


def test_tensorboard_names_the_runs_that_exist(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"there are no runs here\n  -> runs here: none"):
        invoke("tensorboard")
    (folder / "runs" / "first").mkdir(parents=True)
    with pytest.raises(ConfigError, match=r"there is no run 'second'\n  -> runs here: first"):
        invoke("tensorboard", "second")


def test_help_loads_neither_torch_nor_ray() -> None:
    code = (
        "import sys; sys.argv = ['pipeline', '--help']\n"
        "from pipeline.cli import main\n"
        "try: main()\n"
        "except SystemExit as end: assert end.code == 0\n"
        "heavy = {'torch', 'ray', 'deepspeed', 'pydantic', 'numpy', 'yaml'} & set(sys.modules)\n"
        "sys.exit(f'loaded: {sorted(heavy)}' if heavy else 0)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "Usage: pipeline " in done.stdout


def test_the_version_is_printed_with_those_of_the_libraries() -> None:
    shown = invoke("--version").output
    assert re.match(rf"pipeline {re.escape(__version__)} \(Python 3\.\d+\.\d+, torch \d", shown)


def test_help_shows_the_usual_form_and_no_type_for_a_flag(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(command.VARIABLE, "./launch.sh")
    assert run_main(monkeypatch, "--help") == 0
    shown = capsys.readouterr().out
    assert shown.startswith("Usage: ./launch.sh JOB.yaml [options] | COMMAND")
    for arguments in (["--help"], ["run", "--help"], ["bench", "loader", "--help"]):
        assert "<bool>" not in invoke(*arguments).output
    assert re.search(r"--dry-run +Print", invoke("run", "--help").output)
