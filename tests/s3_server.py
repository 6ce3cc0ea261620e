"""A real S3 server on the loopback address that can be told to fail: moto's application behind an HTTP server of our own.

    python tests/s3_server.py PORT        (0: any free one)

prints its URL, then serves until it is stopped.  Keys and secrets may be anything.  While it runs:

    PUT    /_faults   {"slow_down": 0.1, "reset": 0.05, "only": "GET", "at_most": 3, "seed": 1}: what fails from now on
    GET    /_counts   connections, requests by method, bytes of object bodies sent, faults by kind
    DELETE /_counts   begin to count again

Faults are shares of all requests: `slow_down` (503), `internal_error` (500), `denied` (403), `reset` (the connection is cut
with a TCP reset), `lost` (the same, after what was asked for has been done), `silent` (no answer, ever) and `truncated` (half
of an object's body, then the end of the connection).  `only` is a regular expression on "METHOD /path"; `at_most` limits how
many requests fail.
"""

import io
import itertools
import json
import os
import random
import re
import socket
import struct
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote
from urllib.request import Request, urlopen

REFUSALS = {
    "slow_down": (503, "SlowDown", "Please reduce your request rate."),
    "internal_error": (500, "InternalError", "We encountered an internal error. Please try again."),
    "denied": (403, "AccessDenied", "Access Denied"),
}
KINDS = (*REFUSALS, "reset", "lost", "silent", "truncated")
NUMBERS = itertools.count()


class Faults:
    """What fails: one draw per request from a seeded generator."""

    def __init__(self, *, seed: int = 0, only: str = "", at_most: float = float("inf"), **rates: float) -> None:
        unknown = rates.keys() - set(KINDS)
        if unknown:
            raise ValueError(f"there is no fault {min(unknown)}; there are {', '.join(KINDS)}")
        self.rates, self.only, self.left = rates, re.compile(only), at_most
        self.generator, self.lock = random.Random(seed), threading.Lock()

    def draw(self, request: str, sends_object: bool) -> str:
        """The fault of this request, "" for none."""
        if not self.only.search(request):
            return ""
        with self.lock:
            point = self.generator.random()
            for kind in KINDS:
                point -= self.rates.get(kind, 0.0)
                if point < 0:
                    break
            else:
                return ""
            if self.left < 1 or (kind == "truncated" and not sends_object):
                return ""
            self.left -= 1
            return kind


class S3Server(ThreadingHTTPServer):
    """The server and what it counts."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, port: int) -> None:
        from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app

        super().__init__(("127.0.0.1", port), Handler)
        self.application = DomainDispatcherApplication(create_backend_app)
        self.lock, self.faults, self.counts = threading.Lock(), Faults(), Counter[str]()

    def count(self, name: str, amount: int = 1) -> None:
        with self.lock:
            self.counts[name] += amount

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients may go away in the middle; anything else is shown."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)


class Handler(BaseHTTPRequestHandler):
    """One connection, kept open between requests as S3 does."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    @property
    def own(self) -> S3Server:
        assert isinstance(self.server, S3Server)
        return self.server

    def setup(self) -> None:
        super().setup()
        self.own.count("connections")

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def serve(self) -> None:
        body = self._body()
        if self.path.startswith("/_"):
            self._administer(body)
            return
        path = self.path.partition("?")[0]
        sends_object = self.command == "GET" and path.strip("/").count("/") > 0
        fault = self.own.faults.draw(f"{self.command} {unquote(path)}", sends_object)
        self.own.count(self.command)
        if fault:
            self.own.count(fault)
        if fault in ("reset", "lost"):
            if fault == "lost":
                self._ask_moto(body)
            self._reset()
        elif fault == "silent":
            self.connection.recv(1)  # until the other side has had enough
            self.close_connection = True
        elif fault in REFUSALS:
            status, code, message = REFUSALS[fault]
            text = f'<?xml version="1.0" encoding="UTF-8"?><Error><Code>{code}</Code><Message>{message}</Message></Error>'
            self._answer(status, [("Content-Type", "application/xml")], text.encode())
        else:
            status, headers, answer = self._ask_moto(body)
            sent = len(answer) // 2 if fault else len(answer)
            if sends_object and status in (200, 206):
                self.own.count("bytes", sent)
            self._answer(status, headers, answer, sent)

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = serve

    def _body(self) -> bytes:
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = []
        while length := int(self.rfile.readline().split(b";")[0], 16):
            parts.append(self.rfile.read(length))
            self.rfile.readline()
        while self.rfile.readline().strip():  # trailers
            pass
        return b"".join(parts)

    def _ask_moto(self, body: bytes) -> tuple[int, list[tuple[str, str]], bytes]:
        from werkzeug.test import run_wsgi_app

        path, _, query = self.path.partition("?")
        headers = {f"HTTP_{name.upper().replace('-', '_')}": value for name, value in self.headers.items()}
        environ: dict[str, Any] = {
            **headers, "REQUEST_METHOD": self.command, "SCRIPT_NAME": "", "PATH_INFO": unquote(path, "latin-1"),
            "QUERY_STRING": query, "RAW_URI": self.path, "REQUEST_URI": self.path, "SERVER_PROTOCOL": "HTTP/1.1",
            "SERVER_NAME": "127.0.0.1", "SERVER_PORT": str(self.own.server_port), "REMOTE_ADDR": "127.0.0.1",
            "CONTENT_TYPE": self.headers.get("Content-Type", ""), "CONTENT_LENGTH": str(len(body)),
            "wsgi.version": (1, 0), "wsgi.url_scheme": "http", "wsgi.input": io.BytesIO(body), "wsgi.errors": sys.stderr,
            "wsgi.multithread": True, "wsgi.multiprocess": False, "wsgi.run_once": False,
        }  # fmt: skip
        chunks, status, given = run_wsgi_app(self.own.application, environ, buffered=True)
        return int(status.split()[0]), list(given.items()), b"".join(chunks)

    def _answer(self, status: int, headers: list[tuple[str, str]], body: bytes, sent: int | None = None) -> None:
        """Send an answer, or its beginning and then nothing more."""
        self.send_response(status)
        for name, value in headers:
            if name.lower() not in ("content-length", "connection", "transfer-encoding", "date", "server"):
                self.send_header(name, value)
        given = {name.lower(): value for name, value in headers}.get("content-length", "0")
        self.send_header("Content-Length", given if self.command == "HEAD" else str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(memoryview(body)[:sent])
            self.close_connection |= sent is not None and sent < len(body)

    def _reset(self) -> None:
        """Close the connection at once; without lingering, the other side is told by a reset."""
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        os.close(self.connection.detach())
        self.close_connection = True

    def _administer(self, body: bytes) -> None:
        if self.path == "/_faults" and self.command == "PUT":
            try:
                self.own.faults = Faults(**json.loads(body))
            except (TypeError, ValueError) as error:
                self._answer(400, [], str(error).encode())
                return
        elif self.path == "/_counts" and self.command == "DELETE":
            with self.own.lock:
                self.own.counts.clear()
        elif self.path != "/_counts":
            self._answer(404, [], b"")
            return
        with self.own.lock:
            text = json.dumps(self.own.counts)
        self._answer(200, [("Content-Type", "application/json")], text.encode())


@dataclass(frozen=True)
class S3:
    """A running server, as tests, drills and benchmarks see it."""

    url: str

    @property
    def environment(self) -> dict[str, str]:
        """What a process needs to find the server, and nothing else of AWS."""
        nowhere = dict.fromkeys(("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"), os.devnull)
        return nowhere | {
            "AWS_ENDPOINT_URL": self.url, "AWS_ACCESS_KEY_ID": "tester", "AWS_SECRET_ACCESS_KEY": "secret",
            "AWS_DEFAULT_REGION": "us-east-1", "AWS_EC2_METADATA_DISABLED": "true",
        }  # fmt: skip

    def make_bucket(self, name: str = "") -> str:
        """Make a bucket, of a name that this process has not given yet if none is said, and return its URL."""
        name = name or f"bucket-{next(NUMBERS)}"
        self._send("PUT", f"/{name}")
        return f"s3://{name}"

    def fail(self, **faults: Any) -> None:
        """Set what fails from now on (see `Faults`); nothing does without arguments."""
        self._send("PUT", "/_faults", json.dumps(faults).encode())

    def counts(self) -> Counter[str]:
        return Counter(json.loads(self._send("GET", "/_counts")))

    def reset_counts(self) -> None:
        self._send("DELETE", "/_counts")

    def _send(self, method: str, path: str, body: bytes | None = None) -> bytes:
        with urlopen(Request(self.url + path, body, method=method), timeout=10) as answer:
            return answer.read()


@contextmanager
def serving(port: int = 0) -> Iterator[S3]:
    """A server in a process of its own."""
    process = subprocess.Popen([sys.executable, __file__, str(port)], stdout=subprocess.PIPE, text=True)
    assert process.stdout
    try:
        yield S3(process.stdout.readline().strip())
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def main(arguments: list[str]) -> None:
    # moto keeps objects in memory up to this many bytes, in files beyond
    os.environ.setdefault("MOTO_S3_DEFAULT_KEY_BUFFER_SIZE", str(1 << 30))
    server = S3Server(int(arguments[0]) if arguments else 0)
    print(f"http://127.0.0.1:{server.server_port}", flush=True)
    server.serve_forever()


if __name__ == "__main__":
    main(sys.argv[1:])
