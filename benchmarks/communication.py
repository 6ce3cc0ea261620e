"""What communication costs a training step: a short model, for machines that are not here.

Alpha-beta (Thakur et al., 2005, doi:10.1177/1094342005051521): a ring of n passes a message of b bytes around in n - 1 turns of
latency each, (n - 1) / n b bytes over every link; a reduce-scatter and an all-gather are one such round, an all-reduce is both.
Between nodes of g GPUs each it goes three ways: a reduce-scatter within the node, an all-reduce of the g-th part among the
nodes over every GPU's own link, an all-gather within the node.

Engines differ in what they send (Rajbhandari et al., 2020, arXiv:1910.02054, section 7), in bytes of all parameters: ddp,
zero1 and zero2 twice, zero3 three times.  What is sent while a pass computes is hidden behind it, but for its last bucket; the
parameters that zero1 and zero2 gather after the optimizer are not.  On a CPU nothing is hidden, since the cores that send are
those that compute.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

Engine = Literal["ddp", "zero1", "zero2", "zero3"]
Pass = Literal["forward", "backward", "afterwards"]

BUCKET_BYTES = 25 << 20
"""What is sent together: DistributedDataParallel's `bucket_cap_mb`, taken for every engine."""


@dataclass(frozen=True)
class Link:
    """A GPU's connection: bytes per second in each direction, and seconds from one end to the other."""

    bandwidth: float
    latency: float


@dataclass(frozen=True)
class Machine:
    """`gpus` in all, `per_node` of them in every node, joined `within` the node and `between` nodes."""

    gpus: int
    per_node: int
    within: Link
    between: Link

    @property
    def nodes(self) -> int:
        return -(-self.gpus // self.per_node)


@dataclass(frozen=True)
class Step:
    """Seconds of computation of a step on one GPU."""

    forward: float
    backward: float

    @property
    def seconds(self) -> float:
        return self.forward + self.backward


SENT: dict[Engine, tuple[tuple[Pass, int], ...]] = {
    "ddp": (("backward", 2),),
    "zero1": (("backward", 1), ("afterwards", 1)),
    "zero2": (("backward", 1), ("afterwards", 1)),
    "zero3": (("forward", 1), ("backward", 2)),
}
"""What each engine sends during which pass, in rounds (reduce-scatters or all-gathers) of all parameters."""


def volume(engine: Engine, size: float) -> float:
    """Bytes that each of many GPUs sends in a step, for `size` bytes of parameters."""
    return size * sum(rounds for _, rounds in SENT[engine])


def ring_round(size: float, members: int, link: Link) -> float:
    """Seconds of a reduce-scatter or an all-gather of `size` bytes in a ring."""
    return (members - 1) / members * size / link.bandwidth + (members - 1) * link.latency


def round_seconds(size: float, machine: Machine) -> float:
    """Seconds of a reduce-scatter or an all-gather over all GPUs: within the nodes, and of each GPU's part among them."""
    inside = min(machine.gpus, machine.per_node)
    return ring_round(size, inside, machine.within) + ring_round(size / inside, machine.nodes, machine.between)


def sent_seconds(size: float, machine: Machine) -> float:
    """Seconds of a reduce-scatter or an all-gather bucket by bucket, each of which waits for every turn."""
    buckets = max(1, math.ceil(size / BUCKET_BYTES))
    return buckets * round_seconds(size / buckets, machine)


def exposed(engine: Engine, size: float, step: Step, machine: Machine, *, hidden: bool = True) -> float:
    """Seconds that communication adds to a step: what no pass hides, and at least the last bucket of each pass."""
    total = 0.0
    for when, rounds in SENT[engine]:
        seconds = rounds * sent_seconds(size, machine)
        if when == "afterwards" or not hidden:
            total += seconds
        else:
            last = rounds * round_seconds(min(size, BUCKET_BYTES), machine)
            total += max(last, seconds - getattr(step, when))
    return total


def efficiency(engine: Engine, size: float, step: Step, machine: Machine, *, hidden: bool = True) -> float:
    """The share of a step that is computation: what n GPUs do, over n times what one does alone."""
    return step.seconds / (step.seconds + exposed(engine, size, step, machine, hidden=hidden))


def assumed_step(flops: float, peak: float, utilisation: float) -> Step:
    """A step of that many FLOPs on a GPU that reaches that share of its peak; the backward pass is twice the forward."""
    seconds = flops / (peak * utilisation)
    return Step(seconds / 3, seconds * 2 / 3)


def fit_link(sizes: Sequence[float], seconds: Sequence[float], members: int) -> Link:
    """The link whose ring all-reduces take those times: least squares of the relative errors.

    Neither part is taken below zero: where the fit would, the other explains all.
    """
    bytes_over = 2 * (members - 1) / members * np.asarray(sizes, float)
    turns = np.full(len(bytes_over), 2.0 * (members - 1))
    times = np.asarray(seconds, float)
    columns = np.stack([bytes_over, turns], 1) / times[:, None]
    per_byte, latency = np.linalg.lstsq(columns, np.ones(len(times)), rcond=None)[0]
    if latency < 0:
        per_byte, latency = np.linalg.lstsq(columns[:, :1], np.ones(len(times)), rcond=None)[0][0], 0.0
    elif per_byte <= 0:
        per_byte, latency = 0.0, np.linalg.lstsq(columns[:, 1:], np.ones(len(times)), rcond=None)[0][0]
    return Link(float(1 / per_byte) if per_byte else float("inf"), float(latency))
