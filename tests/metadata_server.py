"""The metadata servers of EC2 and Compute Engine, as far as notices of a machine's end go, on the loopback address."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

ACTION = '{"action": "terminate", "time": "2030-01-01T00:00:00Z"}'


class MetadataServer(ThreadingHTTPServer):
    """`leaving`: whether the machine's end is announced.  `failures`: so many requests fail.  `asked`: notices asked for."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.leaving, self.failures, self.asked = False, 0, 0

    @property
    def environment(self) -> dict[str, str]:
        """What a process needs to ask this server."""
        place = f"127.0.0.1:{self.server_port}"
        return {
            "AWS_EC2_METADATA_SERVICE_ENDPOINT": f"http://{place}/",
            "GCE_METADATA_HOST": place,
            "http_proxy": "http://0.0.0.0:9",
        }


class Handler(BaseHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        pass

    def serve(self) -> None:
        assert isinstance(self.server, MetadataServer)
        status, text = self.answer(self.server)
        self.send_response(status)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text.encode())

    do_GET = do_PUT = serve

    def answer(self, own: MetadataServer) -> tuple[int, str]:
        if own.failures:
            own.failures -= 1
            return 503, "later"
        if (self.command, self.path) == ("PUT", "/latest/api/token"):
            return (200, "a token") if self.headers["X-aws-ec2-metadata-token-ttl-seconds"] else (400, "")
        own.asked += 1
        if self.path == "/latest/meta-data/spot/instance-action":
            if self.headers["X-aws-ec2-metadata-token"] != "a token":
                return 401, ""
            return (200, ACTION) if own.leaving else (404, "")
        if self.path == "/computeMetadata/v1/instance/preempted":
            return (200, str(own.leaving).upper()) if self.headers["Metadata-Flavor"] == "Google" else (403, "")
        return 400, ""


@contextmanager
def metadata() -> Iterator[MetadataServer]:
    with MetadataServer() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        thread.start()
        yield server
        server.shutdown()
