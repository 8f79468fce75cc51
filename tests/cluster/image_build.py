"""Builds docker/Dockerfile without a daemon, on a stand-in for its base image.

The base is Debian with Python, made by debootstrap. The packages come from a folder of wheels,
which pip fills. Base, wheels and layers stay in a cache outside the checkout: after a change of the
code, only the last layers are built again.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.cluster import debian
from tests.cluster.fabric import ROOT

NAME = "localhost/revcol-pipeline"
_SUITE = "bookworm"
_MIRROR = "http://deb.debian.org/debian"
_OF_BASE = "python3,python3-venv,python3-dev,ca-certificates"
_SETS = ("run", "ray")  # of requirements/, as in the Dockerfile
_STORAGE = debian.CACHE / "images"
_DRIVER = "overlay"
_PROGRAMS = ("buildah", "debootstrap")


@dataclass(frozen=True, kw_only=True)
class BuiltImage:
    """The image.

    Attributes:
        root: its files, mounted.
        user, folder: user and working directory of its processes.
        environment: variables of its processes.
        entry_point: the program that it runs.
        layers: sizes in bytes, the base first.
    """

    root: Path
    user: str
    folder: str
    environment: Mapping[str, str]
    entry_point: Sequence[str]
    layers: Sequence[int]


@contextlib.contextmanager
def built_image() -> Iterator[BuiltImage]:
    """The image of this checkout, built now."""
    debian.install(_PROGRAMS, _PROGRAMS)
    debian.CACHE.mkdir(parents=True, exist_ok=True)
    with (debian.CACHE / "images.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # two test processes share the storage
        build = ["bud", "--isolation", "chroot", "--network", "host", "--pull-never", "--layers"]
        build += ["--build-arg", f"BASE={_base()}", "--build-context", f"wheels={_wheels()}"]
        build += ["--build-arg", "PIP_OPTIONS=--no-index", "--tag", NAME]
        _buildah(*build, "--file", str(ROOT / "docker" / "Dockerfile"), str(ROOT))
        _buildah("rmi", "--prune")  # what earlier builds have left
        container = _buildah("from", "--pull-never", NAME).strip()
        root = Path(_buildah("mount", container).strip())
        described = json.loads(_buildah("inspect", container))
        layers = _layers()
    config = described["OCIv1"]["config"]
    try:
        yield BuiltImage(
            root=root,
            user=config["User"],
            folder=config["WorkingDir"],
            environment=dict(entry.split("=", 1) for entry in config["Env"]),
            entry_point=config["Entrypoint"],
            layers=layers,
        )
    finally:
        _buildah("rm", container)


def _base() -> str:
    """The name of the stand-in for the base image, made when this file has changed."""
    key = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:16]
    name = f"localhost/stand-in-base:{key}"
    if key in _buildah("images", "--format", "{{.Tag}}").split():
        return name
    with tempfile.TemporaryDirectory(dir=debian.CACHE) as temporary:
        root = Path(temporary) / "root"
        options = ["--variant=minbase", f"--include={_OF_BASE}"]
        _run("debootstrap", *options, _SUITE, str(root), _MIRROR)
        for path in (root / "var" / "cache" / "apt", root / "var" / "lib" / "apt" / "lists"):
            shutil.rmtree(path)
        (root / "etc" / "hosts").touch()  # a container's own is mounted over it
        container = _buildah("from", "scratch").strip()
        _buildah("add", "--quiet", container, str(root), "/")
        _buildah("commit", "--quiet", "--rm", container, name)
    return name


def _wheels() -> Path:
    """A folder with the packages of the image, as this machine's pip finds them."""
    locks = [ROOT / "requirements" / f"{name}.txt" for name in _SETS]
    pins = b"".join(lock.read_bytes() for lock in locks)
    folder = debian.CACHE / f"wheels-{hashlib.sha256(pins).hexdigest()[:16]}"
    if not folder.is_dir():
        with tempfile.TemporaryDirectory(dir=debian.CACHE) as temporary:
            files = [word for lock in locks for word in ("-r", str(lock))]
            made = Path(temporary) / "wheels"
            pip = [sys.executable, "-m", "pip", "wheel", "-q"]
            _run(*pip, *files, "--wheel-dir", str(made))
            made.rename(folder)
    return folder


def _layers() -> list[int]:
    """Sizes of the layers of the image in bytes, the base first."""
    described = json.loads(_buildah("inspect", "--type", "image", NAME))
    wanted = described["OCIv1"]["rootfs"]["diff_ids"]
    known = json.loads((_STORAGE / f"{_DRIVER}-layers" / "layers.json").read_text())
    sizes = {layer["diff-digest"]: layer["diff-size"] for layer in known if "diff-digest" in layer}
    return [sizes[digest] for digest in wanted]


def _buildah(*arguments: str) -> str:
    return _run("buildah", "--root", str(_STORAGE), "--storage-driver", _DRIVER, *arguments)


def _run(*command: str) -> str:
    """Standard output of a command, which must succeed."""
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL
    )
    if done.returncode != 0:
        shown = " ".join(command)
        output = (done.stdout + done.stderr)[-6000:]
        raise RuntimeError(f"{shown}: exit code {done.returncode}\n{output}")
    return done.stdout
