"""An S3 server on the loopback address for the comparison: the shards in it, and what it says was read from it.

The server is the one that the tests use, `tests/s3_server.py`; it is written in Python and takes a core of its own, so that
rates from it are its own as much as the reader's.  Bytes are counted exactly.
"""

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.request import Request, urlopen

from benchmarks.loader_source import open_shards
from benchmarks.loader_tiles import ROOT
from mmearth_ray.copies import upload
from mmearth_ray.storage import locate

SERVER = ROOT / "tests" / "s3_server.py"
NEEDS = ("moto", "s3fs")
BUCKET = "loader-benchmark"


@dataclass(frozen=True)
class Store:
    """A running server."""

    url: str

    def put(self, shards: Path) -> str:
        """Upload a directory of shards; returns its URL."""
        place = locate(f"s3://{BUCKET}/{shards.name}", "data")
        assert not isinstance(place, Path)
        for path in sorted(shards.iterdir()):
            upload(path, place / path.name)
        return str(place)

    def bytes_of_an_epoch(self, url: str, image: int, patch: int, batch: int, *choices: str) -> tuple[int, int]:
        """Bytes of objects that the server sent to open the data set (manifest, footers, metadata), and then for one reader to
        read every tile once."""
        self._ask("DELETE", "/_counts")
        source = open_shards(url, image, patch, *choices)
        opened = self._sent()
        for _ in source.batches((start, min(start + batch, source.samples)) for start in range(0, source.samples, batch)):
            pass
        return opened, self._sent() - opened

    def _sent(self) -> int:
        return json.loads(self._ask("GET", "/_counts"))["bytes"]

    def _ask(self, method: str, path: str) -> bytes:
        with urlopen(Request(self.url + path, method=method), timeout=10) as answer:
            return answer.read()


def missing() -> str:
    """Which package the server needs and is not installed; empty if all are."""
    return next((name for name in NEEDS if importlib.util.find_spec(name) is None), "")


@contextmanager
def serving() -> Iterator[Store]:
    """A server with an empty bucket, that this process and those it starts meanwhile find as theirs."""
    with subprocess.Popen([sys.executable, str(SERVER), "0"], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        store = Store(process.stdout.readline().strip())
        given = {
            "AWS_ENDPOINT_URL": store.url, "AWS_ACCESS_KEY_ID": "benchmark", "AWS_SECRET_ACCESS_KEY": "secret",
            "AWS_DEFAULT_REGION": "us-east-1", "AWS_EC2_METADATA_DISABLED": "true",
            "AWS_CONFIG_FILE": os.devnull, "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
        }  # fmt: skip
        before = {name: os.environ.get(name) for name in given}
        os.environ.update(given)
        try:
            store._ask("PUT", f"/{BUCKET}")
            yield store
        finally:
            process.kill()
            for name, value in before.items():
                os.environ.pop(name) if value is None else os.environ.update({name: value})
