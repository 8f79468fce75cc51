"""Kubernetes' API server and etcd, from Debian's packages, without installing anything.

Debian ships etcd as a program and Kubernetes as a source package. The source is built with Debian's
Go: about 8 CPU-minutes. The programs stay in a cache outside the checkout and are built again only
when this file changes.
"""

from __future__ import annotations

import fcntl
import hashlib
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from tests.cluster.debian import CACHE, unavailable

_SUITE = "bookworm"
_MIRROR = "http://deb.debian.org/debian"
_KEYRING = "/usr/share/keyrings/debian-archive-keyring.gpg"
_SOURCE = "kubernetes"
_PACKAGES = (
    "golang-1.19-go",
    "golang-1.19-src",
    "golang-github-modern-go-reflect2-dev",
    "etcd-server",
    "rsync",  # Kubernetes' makefile copies with it
    "libpopt0",  # of rsync
    "jq",
    "libjq1",
    "libonig5",  # of jq
)
_TOOLS = ("apt-get", "dpkg-source", "make", "gcc")


@dataclass(frozen=True)
class ApiServerPrograms:
    """Paths of the two programs."""

    api_server: Path
    etcd: Path


def programs() -> ApiServerPrograms:
    """The programs, built now if they are not in the cache."""
    key = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:16]
    folder = CACHE / f"api-server-{key}"
    result = ApiServerPrograms(api_server=folder / "kube-apiserver", etcd=folder / "etcd")
    if folder.is_dir():
        return result
    missing = [tool for tool in _TOOLS if shutil.which(tool) is None]
    if missing:
        # The sources are Debian's, and so is the compiler: other systems have no such package.
        unavailable(f"to build Kubernetes' API server, these are missing: {', '.join(missing)}")
    CACHE.mkdir(parents=True, exist_ok=True)
    with (CACHE / "api-server.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # two test processes build once
        if not folder.is_dir():
            work = CACHE / f"build-{key}"
            shutil.rmtree(work, ignore_errors=True)
            work.mkdir()
            _build(work)
            (work / "result").rename(folder)
            shutil.rmtree(work)
    return result


def _build(work: Path) -> None:
    """Leave the programs in the folder ``result`` of the build folder."""
    _unpack(work)
    source = work / "go" / "src" / "k8s.io" / "kubernetes"
    _mend(source, work / "root")
    go = work / "root" / "usr" / "lib" / "go-1.19"
    libraries = work / "root" / "usr" / "lib" / "x86_64-linux-gnu"
    environment = {
        "PATH": f"{go}/bin:{work}/root/usr/bin:/usr/sbin:/usr/bin:/sbin:/bin",
        "LD_LIBRARY_PATH": str(libraries),
        "HOME": str(work),
        "GOROOT": str(go),
        "GOPATH": str(work / "go"),
        "GOCACHE": str(work / "cache"),
        "GOFLAGS": "",
        "CGO_ENABLED": "0",
    }
    _run("make", "WHAT=cmd/kube-apiserver", folder=source, environment=environment)
    result = work / "result"
    result.mkdir()
    shutil.copy(source / "_output" / "bin" / "kube-apiserver", result)
    shutil.copy(work / "root" / "usr" / "bin" / "etcd", result)


def _unpack(work: Path) -> None:
    """Debian's packages below ``root``, Kubernetes' source where Go looks for it."""
    lists, cache = work / "lists", work / "archives"
    for folder in (lists / "partial", cache / "archives" / "partial"):
        folder.mkdir(parents=True)
    signed = f"[signed-by={_KEYRING}] {_MIRROR} {_SUITE} main"
    (work / "sources.list").write_text(f"deb {signed}\ndeb-src {signed}\n")
    options = {
        "Dir::Etc::SourceList": work / "sources.list",
        "Dir::Etc::SourceParts": "/dev/null",
        "Dir::State::Lists": lists,
        "Dir::Cache": cache,
        "APT::Sandbox::User": "",
    }
    apt = ["apt-get", "-qq", *(f"-o{name}={value}" for name, value in options.items())]
    _run(*apt, "update", folder=work)
    _run(*apt, "download", *_PACKAGES, folder=work)
    for package in sorted(work.glob("*.deb")):
        _run("dpkg-deb", "--extract", package, work / "root", folder=work)
    _run(*apt, "source", "--download-only", _SOURCE, folder=work)
    source = work / "go" / "src" / "k8s.io" / "kubernetes"
    source.parent.mkdir(parents=True)
    description = next(work.glob("*.dsc"))
    _run("dpkg-source", "--no-check", "--extract", description, source, folder=work)


def _mend(source: Path, root: Path) -> None:
    """Two places of the source fit older releases of Go only: the server would crash."""
    reflect = Path("github.com") / "modern-go" / "reflect2"
    vendored = source / "vendor" / reflect
    shutil.rmtree(vendored)
    shutil.copytree(root / "usr" / "share" / "gocode" / "src" / reflect, vendored)
    validation = source / "vendor" / "k8s.io" / "kube-openapi" / "pkg" / "validation"
    checks = validation / "validate" / "type.go"
    lines = checks.read_text().splitlines()
    line = next(i for i, text in enumerate(lines) if "reflect.DeepEqual(reflect.Zero" in text)
    # reflect.DeepEqual of two reflect.Values takes an empty text for null since Go 1.18.
    lines[line] = "\tif data == nil {"
    checks.write_text("\n".join(lines) + "\n")


def _run(*command: str | Path, folder: Path, environment: dict[str, str] | None = None) -> None:
    done = subprocess.run(
        [str(word) for word in command],
        cwd=folder,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        shown = " ".join(map(str, command))
        raise RuntimeError(f"{shown}: exit code {done.returncode}\n{done.stdout[-6000:]}")


if __name__ == "__main__":
    print(programs())
