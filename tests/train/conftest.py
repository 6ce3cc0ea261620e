"""What several tests of training start from."""

import time
from pathlib import Path

import pytest
from s3_server import S3
from tiny_earth import make_data_set
from upath import UPath

from mmearth_ray.storage import locate


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight tiles of 40 px; files that need others have their own."""
    folder = tmp_path_factory.mktemp("data") / "tiny"
    make_data_set(folder, tiles=8, size=40)
    return folder


@pytest.fixture
def store(s3: S3, monkeypatch: pytest.MonkeyPatch) -> UPath:
    """A place for checkpoints on a store.  Waiting for it takes no time."""
    found = locate(f"{s3.make_bucket()}/run", "checkpoint.directory")
    assert isinstance(found, UPath)
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    return found
