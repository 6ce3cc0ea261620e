"""What several tests of training start from."""

import time

import pytest
from s3_server import S3
from upath import UPath

from mmearth_ray.storage import locate


@pytest.fixture
def store(s3: S3, monkeypatch: pytest.MonkeyPatch) -> UPath:
    """A place for checkpoints on a store.  Waiting for it takes no time."""
    found = locate(f"{s3.make_bucket()}/run", "checkpoint.directory")
    assert isinstance(found, UPath)
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    return found
