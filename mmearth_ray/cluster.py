"""Joining a Ray cluster, or starting a Ray of our own on this machine.

Our own Ray listens on the loopback address only, has no dashboard and sends no usage statistics.
"""

import logging
import os
import socket
from collections.abc import Iterable
from contextlib import suppress
from typing import Any

import psutil
import ray
from ray._private import ray_constants

from mmearth_ray.errors import DataError, UsageError, one_line

LOOPBACK = "127.0.0.1"
CONNECT_SECONDS = 10.0
STARTS = 3
END_SECONDS = 10.0


def join_or_start(own_cpus: int, address: str = "") -> None:
    """Join the cluster at `address` or RAY_ADDRESS; without either, start a Ray with that many logical CPUs.

    Does nothing where this process has joined already.  Raises UsageError if the cluster cannot be reached, DataError if a Ray
    of our own does not start.
    """
    if ray.is_initialized():
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if not (cluster := cluster_address(address)):
        _stay_on_loopback()
        _start(num_cpus=own_cpus, include_dashboard=False, _node_ip_address=LOOPBACK, **quiet)
        return
    try:
        _reach(cluster)
        _show_token()
        ray.init(address=cluster, **quiet)
    except (OSError, ValueError, RuntimeError) as error:
        raise UsageError(
            f"cannot join the Ray cluster at {cluster} ({one_line(error)}); correct run.address or RAY_ADDRESS, or unset them "
            "to start a Ray on this machine"
        ) from error


def cluster_address(given: str = "") -> str:
    """The cluster to join, by a setting or else by RAY_ADDRESS; empty for a Ray of our own."""
    address = given or os.environ.get("RAY_ADDRESS", "")
    return "" if address == "local" else address


def _start(**options: Any) -> None:
    """Start a Ray, and again where it does not come up in the time that Ray gives itself."""
    for left in reversed(range(STARTS)):
        before = set(psutil.Process().children())
        try:
            ray.init(address="local", **options)
            return
        except Exception as error:  # Ray raises no narrower one
            ray.shutdown()
            _end(set(psutil.Process().children()) - before)
            if isinstance(error, TypeError | ValueError):  # of its settings in the environment
                raise DataError(f"Ray does not start on this machine ({one_line(error)})") from error
            if not left:
                raise DataError(f"Ray did not start on this machine in {STARTS} attempts ({one_line(error)}); it may be too "
                                "busy: run the command again once it is not") from error  # fmt: skip


def _end(started: Iterable[psutil.Process]) -> None:
    """End processes and those that they have started: Ray forgets what it started for a node that does not come up."""
    found = list(started)
    for process in found.copy():
        with suppress(psutil.NoSuchProcess):
            found += process.children(recursive=True)
    for process in found:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(found, timeout=END_SECONDS)


def _stay_on_loopback() -> None:
    """Take Ray at its word: on Linux it puts the machine's own address in the place of 127.0.0.1, unless clusters are off."""
    os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"  # for the processes that Ray starts
    ray_constants.ENABLE_RAY_CLUSTER = False  # for this one, where Ray has read it already


def _show_token() -> None:
    """Use this user's cluster token if there is one, as `ray start` does; without it such a cluster refuses to answer."""
    logging.getLogger("ray._private.authentication").setLevel(logging.ERROR)
    with suppress(ImportError):  # Ray's own function, but no public one: another version may lack it
        from ray._private.authentication.authentication_token_setup import maybe_enable_token_auth_if_token_available

        maybe_enable_token_auth_if_token_available(warn_if_disabled=False)


def _reach(cluster: str) -> None:
    """Raise OSError if nothing answers at host:port; Ray itself would go on trying for minutes."""
    host, colon, port = cluster.rpartition(":")
    if colon and port.isdigit() and "/" not in host:
        socket.create_connection((host, int(port)), CONNECT_SECONDS).close()
