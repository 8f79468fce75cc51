"""An S3-compatible server, and a proxy in front of it that injects faults in a repeatable way."""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import socket
import struct
import threading
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

KEY = "AKIDOFATEST"
SECRET = "wJalrXUtnFEMI-planted-secret"
THROTTLED = (
    b"<?xml version='1.0'?><Error><Code>SlowDown</Code>"
    b"<Message>Please reduce your request rate.</Message></Error>"
)
REFUSED = (
    b"<?xml version='1.0'?><Error><Code>AccessDenied</Code><Message>Access Denied</Message></Error>"
)
Request = tuple[str, str, str]  # method, path, Range header


class Proxy:
    """An HTTP proxy in front of one server.

    ``share``: share of the requests that meet a fault; the same request meets at most
    ``in_a_row`` faults in a row, so that retries succeed. Faults: a 503 SlowDown, a connection
    closed before the answer ("reset") or in the middle of it ("cut"). Which request meets which
    fault is a function of (seed, request, number of times that it was sent).
    ``always``: the fault that every request meets; "" for none.
    ``held``: answers to requests with this text in their path stop half-way until ``go`` is set.
    ``seen``: number of requests. ``faults``: number of faults by kind.
    """

    KINDS = ("throttled", "reset", "cut")

    def __init__(
        self,
        host: str,
        port: int,
        seed: int = 0,
        share: float = 0.0,
        in_a_row: int = 3,
        *,
        own_port: int = 0,
    ) -> None:
        self.upstream = (host, port)
        self.seed = seed
        self.share = share
        self.in_a_row = in_a_row
        self.always = ""
        self.held = ""
        self.go = threading.Event()
        self.seen: Counter[Request] = Counter()
        self.faults: Counter[str] = Counter()
        self._faults_in_a_row: Counter[Request] = Counter()
        self._lock = threading.Lock()
        handler = type("Handler", (_Handler,), {"proxy": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", own_port), handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(
            target=self._server.serve_forever, args=(0.05,), daemon=True
        )
        self._thread.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}"

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def fault(self, method: str, path: str, span: str) -> str:
        """The fault that this request meets; "" for none."""
        request = (method, path, span)
        with self._lock:
            self.seen[request] += 1
            drawn = hashlib.sha256(repr((self.seed, request, self.seen[request])).encode()).digest()
            kind = self.always
            row = self._faults_in_a_row[request]
            if not kind and drawn[0] < 256 * self.share and row < self.in_a_row:
                kind = self.KINDS[drawn[1] % len(self.KINDS)]
            self._faults_in_a_row[request] = row + 1 if kind else 0
            if kind:
                self.faults[kind] += 1
            return kind


class _Handler(BaseHTTPRequestHandler):
    proxy: Proxy
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self._answer(b"")

    do_HEAD = do_GET

    def do_PUT(self) -> None:
        self._answer(self.rfile.read(int(self.headers.get("Content-Length", 0))))

    def _answer(self, body: bytes) -> None:
        fault = self.proxy.fault(self.command, self.path, self.headers.get("Range", ""))
        if fault == "throttled":
            self._send_error_document(503, THROTTLED)
        elif fault == "refused":
            self._send_error_document(403, REFUSED)
        elif fault == "reset":
            self._close_connection()
        else:
            status, headers, data = self._forward(body)
            half = len(data) // 2
            if fault == "cut":
                self._send(status, headers, data[:half])
                self._close_connection()
            elif self.proxy.held and self.proxy.held in self.path:
                self._send(status, headers, data[:half])
                self.wfile.flush()
                self.proxy.go.wait(30)
                with contextlib.suppress(OSError):
                    self.wfile.write(data[half:] if self.command != "HEAD" else b"")
            else:
                self._send(status, headers, data)

    def _send_error_document(self, status: int, text: bytes) -> None:
        headers = {"Content-Type": "application/xml", "Content-Length": str(len(text))}
        self._send(status, headers, text)

    def _forward(self, body: bytes) -> tuple[int, dict[str, str], bytes]:
        """Status, headers and body of the server's answer."""
        connection = http.client.HTTPConnection(*self.proxy.upstream, timeout=30)
        try:
            connection.request(self.command, self.path, body or None, dict(self.headers.items()))
            response = connection.getresponse()
            data = response.read()
        finally:
            connection.close()
        dropped = ("connection", "transfer-encoding", "content-length", "date", "server")
        headers = {
            name: value for name, value in response.getheaders() if name.lower() not in dropped
        }
        length = response.getheader("Content-Length") if self.command == "HEAD" else str(len(data))
        return response.status, {**headers, "Content-Length": length or "0"}, data

    def _send(self, status: int, headers: dict[str, str], data: bytes) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _close_connection(self) -> None:
        """Close the connection with a reset instead of a regular end."""
        self.wfile.flush()
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close_connection = True
        with contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_WR)

    def log_message(self, format: str, *args: object) -> None:
        pass


@contextlib.contextmanager
def s3_server(host: str = "127.0.0.1", port: int = 0) -> Iterator[tuple[str, int]]:
    """Host and port of an empty S3-compatible server."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(host, port, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        yield host, port
    finally:
        server.stop()


def environment(endpoint: str) -> dict[str, str]:
    """Environment variables that point a process to a store; a job never contains any of this."""
    return {
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_ACCESS_KEY_ID": KEY,
        "AWS_SECRET_ACCESS_KEY": SECRET,
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_MAX_ATTEMPTS": "1",
    }


def upload(host: str, port: int, folder: Path, bucket: str, acl: str = "private") -> None:
    """Upload all files below a folder into a new bucket."""
    import boto3

    store = boto3.client(
        "s3",
        endpoint_url=f"http://{host}:{port}",
        aws_access_key_id=KEY,
        aws_secret_access_key=SECRET,
        region_name="us-east-1",
    )
    store.create_bucket(Bucket=bucket)
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            store.put_object(
                Bucket=bucket, Key=str(path.relative_to(folder)), Body=path.read_bytes(), ACL=acl
            )
