"""Joining a cluster that is not there is answered at once."""

import socket

import pytest

from mmearth_ray.cluster import join_or_start
from mmearth_ray.errors import UsageError


def test_an_address_where_nothing_listens_is_refused_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(UsageError, match=f"cannot join the Ray cluster at {address}"):
        join_or_start(1)
