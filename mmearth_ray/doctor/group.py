"""A group of workers that add up a buffer, as gradients are in every step: is the sum right, how long does it take.

`Member` runs in a process of its own on the machine where a train worker would run; nothing here knows Ray.
"""

import os
import socket
import time
from collections.abc import Callable
from datetime import timedelta
from typing import NamedTuple

import torch
import torch.distributed as dist

from mmearth_ray.errors import DataError

BUFFER = 64 << 20
"""Bytes that are added up: what DDP sends at a time is 25 MB, and rates change little beyond."""

TIMES = 5


class Seat(NamedTuple):
    """Where a member is: the machine, the address on which the others find it, and what it computes on."""

    host: str
    address: str
    device: str


class Member:
    """One worker of the group."""

    def seat(self, host_of: Callable[[], str], gpu: bool) -> Seat:
        """Find a free port and say where this is, by the machine's name among the others.

        Raises DataError if there is to be a GPU and torch sees none.
        """
        host = host_of()
        if gpu and not torch.cuda.is_available():
            raise DataError(f"torch {torch.__version__} sees no GPU on {host}; install a build for CUDA and NVIDIA's driver")
        self.device = torch.device("cuda", 0) if gpu else torch.device("cpu")
        with socket.socket() as free:
            free.bind(("", 0))
            port = free.getsockname()[1]
        name = torch.cuda.get_device_name(self.device) if gpu else "CPU"
        return Seat(host, f"tcp://{host}:{port}", name)

    def join(self, rank: int, world: int, address: str, seconds: float) -> None:
        """Find the others.  Raises RuntimeError if they do not come in time."""
        os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "1")
        self.rank, self.world = rank, world
        backend = "nccl" if self.device.type == "cuda" else "gloo"
        dist.init_process_group(
            backend, init_method=address, rank=rank, world_size=world, timeout=timedelta(seconds=max(1.0, seconds))
        )

    def reduce(self, size: int = BUFFER, times: int = TIMES) -> float:
        """Seconds that a sum of that many bytes over all members takes, at best.  Raises DataError if a sum is wrong.

        The numbers are small and whole, so that the sum is exact in whatever order it is made.
        """
        pattern = torch.arange(97.0, device=self.device).repeat(size // (4 * 97))
        own, expected = pattern * (self.rank + 1), pattern * (self.world * (self.world + 1) / 2)
        best = float("inf")
        for _ in range(times):
            buffer = own.clone()
            dist.barrier()
            self._wait()
            begin = time.perf_counter()
            dist.all_reduce(buffer)
            self._wait()
            best = min(best, time.perf_counter() - begin)
            if wrong := int((buffer != expected).sum()):
                raise DataError(f"{wrong:,} of {buffer.numel():,} sums over {self.world} workers are wrong on rank "
                                f"{self.rank}; the network or a driver damages data: do not train here")  # fmt: skip
        return best

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def leave(self) -> None:
        dist.destroy_process_group()


def bus_rate(size: int, seconds: float, world: int) -> float:
    """Bytes a second that each worker's link carries: a ring sends 2 (W - 1) / W of the buffer over every link."""
    return 2 * (world - 1) / world * size / seconds
