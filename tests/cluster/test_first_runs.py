"""docs/clusters.md, followed to the letter with the whole quickstart: Ray, Slurm, Kubernetes.

All give the exported model of a run on one machine. Every machine has one core, or its
processes use one, so that it computes with as many threads as each of the two processes there.
"""

from __future__ import annotations

import compileall
import contextlib
import re
import secrets
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import yaml

from pipeline.files import file_digest
from pipeline.layout import VERIFICATION
from tests.cluster.exposure import beyond_loopback, places_of
from tests.cluster.fabric import ROOT, Fabric, FabricMachine, environment_of_machine, one_core
from tests.cluster.kubernetes_site import kubernetes_cluster
from tests.cluster.sites import Command
from tests.cluster.slurm_machines import SlurmMachines, install
from tests.data.small_datasets import jpeg
from tests.docs.markdown import Block, blocks, commands

CHECKOUT = ("launch.sh", "requirements", "pipeline", "configs", "jobs", "pyproject.toml")
QUICKSTART_S = 1200


def blocks_of(title: str, language: str = "bash") -> list[Block]:
    """The blocks of a section of docs/clusters.md."""
    document = ROOT / "docs" / "clusters.md"
    lines = document.read_text().splitlines()
    first = lines.index(f"## {title}") + 1
    last = next((i for i in range(first, len(lines)) if lines[i].startswith("## ")), len(lines))
    return [
        block
        for block in blocks(language)
        if block.document == document and first < block.line <= last
    ]


# File, key and value of the checkout: the guides' own commands, in less time.
SHORTER = [
    ("jobs/quickstart.yaml", "images_per_class", "20"),
    ("jobs/quickstart.yaml", "validation_per_class", "4"),
    ("configs/recipe/quickstart_pretrain.yaml", "epochs", "3"),
    ("configs/recipe/quickstart_finetune.yaml", "epochs", "1"),
]


def check_out(folder: Path) -> Path:
    """A checkout that every machine sees, with a shorter quickstart."""
    checkout = folder / "checkout"
    checkout.mkdir()
    for name in CHECKOUT:
        if (ROOT / name).is_dir():
            ignored = shutil.ignore_patterns("__pycache__")
            shutil.copytree(ROOT / name, checkout / name, ignore=ignored)
        else:
            shutil.copy2(ROOT / name, checkout / name)
    for name, key, value in SHORTER:
        text = (checkout / name).read_text()
        text, count = re.subn(rf"(?m)^( *{key}: )\d+", rf"\g<1>{value}", text)
        assert count, name
        (checkout / name).write_text(text)
    # Processes on the machines leave no compiled files behind for the next ones.
    assert compileall.compile_dir(checkout / "pipeline", quiet=1)
    return checkout


@dataclass(kw_only=True)
class Reader:
    """Types the commands of the document on machines of the tests.

    ``replaced``: what the document writes for an address or a folder of the reader's own.
    """

    checkout: Path
    replaced: dict[str, str] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)

    def own(self, text: str) -> str:
        for name, value in self.replaced.items():
            text = text.replace(name, value)
        return text

    def words(self, command: list[str]) -> list[str]:
        return shlex.split(self.own(shlex.join(command)))

    def write(self, name: str, block: Block) -> None:
        """Write a file of the reader's own."""
        (self.checkout / name).write_text(self.own(block.text))

    def export(self, command: list[str]) -> None:
        """``export NAME=VALUE ...``"""
        assert command[0] == "export"
        self.environment |= dict(word.split("=", 1) for word in self.words(command)[1:])

    def start(self, machine: FabricMachine, command: list[str], *before: str) -> Command:
        output = self.checkout.parent / f"typed-{secrets.token_hex(4)}.txt"
        with open(output, "w") as file:
            process = machine.popen(
                *("env", "-C", self.checkout, *before),
                *self.words(command),
                environment=in_environment(self.checkout, self.environment),
                output=file,
            )
        return Command(process=process, output_file=output, on_machine=True, limit_s=QUICKSTART_S)

    def run(self, machine: FabricMachine, command: list[str]) -> str:
        return output_of(self.start(machine, command))


def output_of(command: Command, code: int = 0) -> str:
    """The whole output of a command, which ends with this exit code."""
    assert command.end() == code, command.output
    return command.output


def in_environment(checkout: Path, added: Mapping[str, str]) -> dict[str, str]:
    """The environment that launch.sh uses as it is: that of the tests.

    What a machine has compiled, the others find in a shared folder: it takes a minute.
    """
    compiled = str(checkout.with_name("compiled"))
    shared = {"OMP_NUM_THREADS": "1", "TORCHINDUCTOR_CACHE_DIR": compiled}
    return {"VIRTUAL_ENV": sys.prefix, **shared, **added}


def exported(run: Path) -> dict[str, str]:
    """Digests of the exported files, but of that which says how fast they were loaded."""
    return {
        path.name: file_digest(path)
        for path in sorted((run / "export").iterdir())
        if path.name != VERIFICATION
    }


@pytest.fixture(scope="module")
def checkout(shared_folder: Path) -> Path:
    return check_out(shared_folder)


@pytest.fixture(scope="module")
def on_one_machine(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What the quickstart exports without a cluster."""
    run = tmp_path_factory.mktemp("quickstart") / "quickstart"
    command = [str(checkout / "launch.sh"), "jobs/quickstart.yaml", "--run-dir", str(run)]
    settings = ["cluster.processes=2", "cluster.threads=1"]
    subprocess.run(
        [*command, *(word for setting in settings for word in ("--set", setting))],
        check=True,
        cwd=checkout,
        env=environment_of_machine(in_environment(checkout, {})),
    )
    return exported(run)


def test_first_run_on_a_ray_cluster(
    fabric: Fabric, shared_folder: Path, checkout: Path, on_one_machine: dict[str, str]
) -> None:
    start, use = (list(commands(block)) for block in blocks_of("First run on a Ray cluster"))
    n1, n2, user = (fabric.up(name) for name in ("n1", "n2", "user"))
    token = shared_folder / "token"
    token.touch(mode=0o600)
    token.write_text(secrets.token_hex(32))
    site = Reader(checkout=checkout, replaced={"DIR": str(shared_folder)})
    site.export(start[0])
    head = site.start(n1, start[1], *one_core(0))
    # "with the address that the first one prints"
    site.replaced["10.0.0.1:6379"] = head.wait_for_match(r"head at (\S+)")[1]
    site.start(n2, start[2], *one_core(1)).wait_for("Ray is up")

    photos = checkout / "photos"
    photos.mkdir()
    (photos / "one.jpg").write_bytes(jpeg(1, 200, 150))
    reader = Reader(
        checkout=checkout,
        replaced={
            "DIR": str(shared_folder),
            "10.0.0.1": n1.address,
            "/shared/runs": str(shared_folder / "runs"),
        },
    )
    [cluster] = blocks_of("First run on a Ray cluster", "yaml")
    reader.write("two.yaml", cluster)
    doctor, submit, fetch, predict = use
    assert "check versions: " in reader.run(user, doctor)
    # What is in the user's own environment stays there.
    planted = secrets.token_hex(32)
    reader.environment["AWS_SECRET_ACCESS_KEY"] = planted
    submitted = reader.start(user, submit)
    submitted.wait_for_match(r"pretrain \d+/\d+ .*images/s")
    assert places_of(planted.encode(), [n1, n2], [shared_folder]) == []
    assert places_of(token.read_bytes(), [n1, n2, user], [shared_folder], allowed=[token]) == []
    assert beyond_loopback(user) == set()
    output = output_of(submitted)
    assert re.search(r"^evaluate +done", output, re.MULTILINE), output
    reader.run(user, fetch)
    assert exported(checkout / "runs" / "quickstart") == on_one_machine
    assert "one.jpg" in reader.run(user, predict)
    shutil.rmtree(checkout / "runs")
    shutil.rmtree(shared_folder / "runs")


def test_first_run_and_first_failure_under_slurm(
    slurm: SlurmMachines,
    shared_folder: Path,
    checkout: Path,
    on_one_machine: dict[str, str],
) -> None:
    [first_run] = (list(commands(block)) for block in blocks_of("First run under Slurm"))
    [failure] = (list(commands(block)) for block in blocks_of("First failure"))
    reader = Reader(
        checkout=checkout,
        replaced={"/shared/runs": str(shared_folder / "runs")},
        environment=dict(slurm.environment),
    )
    [cluster] = blocks_of("First run under Slurm", "yaml")
    reader.write("two.yaml", cluster)
    doctor, submit, runs = first_run
    assert "check versions: " in reader.run(slurm.login, doctor)
    submitted = reader.start(slurm.login, submit)
    submitted.wait_for_match(r"pretrain \d+/\d+ .*images/s")
    assert "quickstart" in reader.run(slurm.login, runs)
    stop, logs, runs, again = failure
    reader.run(slurm.login, stop)
    output_of(submitted, 75)
    assert "pretrain" in reader.run(slurm.login, logs)
    assert re.search(r"quickstart +interrupted", reader.run(slurm.login, runs))
    output = reader.run(slurm.login, again)
    assert re.search(r"^evaluate +done", output, re.MULTILINE), output
    assert exported(shared_folder / "runs" / "quickstart") == on_one_machine
    shutil.rmtree(checkout / "runs")


def test_first_run_on_kubernetes(
    shared: Path,
    shared_folder: Path,
    checkout: Path,
    on_one_machine: dict[str, str],
) -> None:
    """The commands of the administrator and of Docker are those of other tests."""
    grant, _, use = (list(commands(block)) for block in blocks_of("First run on Kubernetes"))
    role = yaml.safe_load((ROOT / grant[0][-1]).read_text())
    assert f"--role={role['metadata']['name']}" in grant[1]
    folder = shared_folder / "kubernetes"
    folder.mkdir()
    with kubernetes_cluster(folder) as site:
        reader = Reader(
            checkout=checkout,
            replaced={"path: /runs": f"path: {site.claim}"},
            environment=site.environment,
        )
        [cluster] = blocks_of("First run on Kubernetes", "yaml")
        reader.write("two.yaml", cluster)
        render, doctor, submit, fetch = use
        assert "kind: RayJob" in typed_here(reader, render)
        assert "2 machines checked in" in typed_here(reader, doctor)
        output = typed_here(reader, submit)
        assert re.search(r"^evaluate +done", output, re.MULTILINE), output
        typed_here(reader, fetch)
    assert exported(checkout / "runs" / "quickstart") == on_one_machine
    shutil.rmtree(checkout / "runs")


def typed_here(reader: Reader, command: list[str]) -> str:
    """Output of a command on the host, which reaches the API server."""
    done = subprocess.run(
        reader.words(command),
        cwd=reader.checkout,
        env=environment_of_machine(in_environment(reader.checkout, reader.environment)),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


@pytest.fixture(scope="module")
def slurm(shared_folder: Path) -> Iterator[SlurmMachines]:
    install()
    with contextlib.ExitStack() as stack:
        fabric = stack.enter_context(Fabric(shared=[shared_folder]))
        machines = SlurmMachines(fabric=fabric, folder=shared_folder, one_core=True)
        machines.up()
        yield machines
