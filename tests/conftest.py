"""One thread for PyTorch in the tests' own process: models are tiny, and threads that wait for each other cost more."""

import sys
from collections.abc import Iterator

import fsspec
import pytest
import torch
from nodes import Nodes
from s3_server import S3, serving

torch.set_num_threads(1)


@pytest.fixture(scope="module", autouse=True)
def no_ray_left() -> Iterator[None]:
    """A Ray that a file's tests started in this process ends with them: the next file's tests find none."""
    yield
    if ray := sys.modules.get("ray"):
        ray.shutdown()


@pytest.fixture(scope="session")
def s3_server() -> Iterator[S3]:
    """The S3 server of this session of tests."""
    with serving() as server:
        yield server


@pytest.fixture
def s3(s3_server: S3, monkeypatch: pytest.MonkeyPatch) -> Iterator[S3]:
    """The server with nothing that fails, which this process and those that it starts find by themselves."""
    s3_server.fail()
    s3_server.reset_counts()
    for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    for name, value in s3_server.environment.items():
        monkeypatch.setenv(name, value)
    yield s3_server
    s3_server.fail()
    fsspec.get_filesystem_class("s3").clear_instance_cache()


@pytest.fixture
def nodes() -> Iterator[Nodes]:
    """A cluster of a head alone, which has no CPU."""
    cluster = Nodes()
    try:
        yield cluster
    finally:
        cluster.close()
