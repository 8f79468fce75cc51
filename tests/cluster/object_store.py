"""An object store for machines of the tests: a server on one of them, and a proxy on each.

    python -m tests.cluster.object_store serve FOLDER           an S3-compatible server
    python -m tests.cluster.object_store proxy HOST COUNTS SHARE

Every machine reads through the proxy on its own loopback address, which counts the requests (in the
file COUNTS, as JSON) and lets a SHARE of them fail.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

from pipeline.files import write_json
from tests.cluster.fabric import FabricMachine, MachineProcess
from tests.cluster.processes import wait_until
from tests.storage import Proxy, environment, s3_server, upload

SERVER_PORT = 9001
PROXY_PORT = 9000
BUCKET = "sets"
ENVIRONMENT = environment(f"http://127.0.0.1:{PROXY_PORT}")
_WRITE_S = 0.2
_START_S = 60.0


def serve_on(machine: FabricMachine, folder: Path) -> None:
    """Start the server, with the files of a folder in its bucket."""
    _start(machine, folder / ".served", ["serve", str(folder)])


def proxy_on(
    machine: FabricMachine, server: str, counts: Path, share: float = 0.0
) -> MachineProcess:
    """Start the proxy of a machine."""
    counts.unlink(missing_ok=True)
    return _start(machine, counts, ["proxy", server, str(counts), str(share)])


def fetches(counts: Path) -> dict[str, int]:
    """How often each file was read, by name."""
    record = json.loads(counts.read_text())
    return {str(name): int(count) for name, count in record["reads"].items()}


def faults(counts: Path) -> dict[str, int]:
    """How many requests failed on purpose, by kind."""
    record = json.loads(counts.read_text())
    return {str(name): int(count) for name, count in record["faults"].items()}


def _start(machine: FabricMachine, written: Path, arguments: list[str]) -> MachineProcess:
    """Start this module on a machine, and wait for the file that it writes when it is ready."""
    process = machine.popen("python", "-m", "tests.cluster.object_store", *arguments)
    wait_until(
        lambda: written.exists() or process.poll() is not None, "the store", _START_S, poll_s=0.1
    )
    assert process.poll() is None
    return process


def _serve(folder: Path) -> None:
    with s3_server("0.0.0.0", SERVER_PORT):
        upload("127.0.0.1", SERVER_PORT, folder, BUCKET)
        (folder / ".served").touch()
        time.sleep(1e6)


def _proxy(server: str, counts: Path, share: float) -> None:
    proxy = Proxy(server, SERVER_PORT, share=share, own_port=PROXY_PORT)
    while True:
        reads: dict[str, int] = {}
        for (method, path, _), count in list(proxy.seen.items()):
            if method == "GET":
                name = path.partition("?")[0].rpartition("/")[2]
                reads[name] = reads.get(name, 0) + count
        write_json(counts, {"reads": reads, "faults": dict(proxy.faults)})
        time.sleep(_WRITE_S)


if __name__ == "__main__":
    if sys.argv[1] == "serve":
        _serve(Path(sys.argv[2]))
    else:
        _proxy(sys.argv[2], Path(sys.argv[3]), float(sys.argv[4]))
