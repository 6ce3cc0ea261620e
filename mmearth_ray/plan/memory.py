"""What every engine holds of a model on each GPU: weights, gradients, the optimizer's state, buffers, and activations.

All of it is float32 whatever the precision (train/engine.py): bf16 only makes activations smaller, and adds copies of the
weights in bfloat16, which count among them.  What DeepSpeed holds was read in its 0.19 (runtime/zero/stage_1_and_2.py and
stage3.py): a float32 copy of the weights that a worker updates, in all stages; a bucket of gradients that are reduced together;
and, in stage 3, weights from their first use in the forward pass until their gradient is there, up to `LIVE` of them.

Shapes: P elements of all parameters, W workers.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from mmearth_ray.plan.passes import Passes
from mmearth_ray.train.zero import KEPT_WHOLE, LIVE, bucket_of

FLOAT = 4
"""Bytes of a weight, of its gradient and of each of AdamW's two moments: all float32, also under autocast."""

SPARE = 0.1
"""Share of a GPU's memory that is left to CUDA, its libraries and gaps."""


@dataclass(frozen=True)
class Memory:
    """Bytes of one worker's tensors at the moment when it holds most.

    optimizer: both moments and DeepSpeed's copy of the weights.  buffers: of gradients that are sent together.
    """

    weights: float
    gradients: float
    optimizer: float
    buffers: float
    activations: float

    @property
    def total(self) -> float:
        return self.weights + self.gradients + self.optimizer + self.buffers + self.activations

    def on_gpu(self, *, offload: bool) -> float:
        """Bytes of a GPU's memory: with `train.offload` what the optimizer holds is in the host's."""
        return self.total - (self.optimizer if offload else 0)


@dataclass(frozen=True)
class Load:
    """What a worker works through: the passes of a micro-batch of so many tiles, one of several in a step or not."""

    passes: Passes
    tiles: int
    workers: int
    accumulates: bool

    @property
    def snapshots(self) -> Iterator[tuple[int, int]]:
        """Bytes of activations, and elements of the gradients that are there, one stretch of the passes after the other."""
        return ((one.activations(self.tiles), one.done) for one in self.passes.snapshots)

    @property
    def elements(self) -> int:
        return sum(self.passes.parameters)

    @property
    def part(self) -> float:
        """P / W."""
        return self.elements / self.workers

    @property
    def bucket(self) -> int:
        return bucket_of(self.elements)


def of_ddp(load: Load) -> Iterator[Memory]:
    """Everything on every worker.  Several workers keep their gradients, the buckets that travel, from step to step."""
    whole = load.elements
    kept = load.workers > 1 or load.accumulates
    for activations, done in load.snapshots:
        yield _memory(whole, whole if kept else done, 2 * whole, 0, activations)


def of_zero1(load: Load) -> Iterator[Memory]:
    """Gradients are whole until the step's last backward pass is done; then they go through the bucket."""
    whole, part = load.elements, load.part
    for activations, done in load.snapshots:
        buffers = load.bucket if done else 0
        yield _memory(whole, whole if load.accumulates else done, 3 * part, buffers, activations)
    yield _memory(whole, max(0, whole - load.bucket) + part, 3 * part, load.bucket, 0)


def of_zero2(load: Load) -> Iterator[Memory]:
    """Gradients go through the bucket as they come; a worker keeps its part, of this micro-batch and of those before."""
    whole, part = load.elements, load.part
    before = part if load.accumulates else 0
    for activations, done in load.snapshots:
        mine = part if done > load.bucket else 0
        yield _memory(whole, before + mine, 3 * part, load.bucket if done else 0, activations)
    yield _memory(whole, before + part, 3 * part, load.bucket, 0)
    yield _memory(whole, 2 * part, 3 * part, 0, 0)  # the update takes them in one piece


def of_zero3(load: Load) -> Iterator[Memory]:
    """As zero2, and weights come and go.  The part of the gradients and the bucket stay.

    A buffer of the bucket's size comes on top while weights are gathered, until the forward pass has used them all, and while
    gradients are reduced.
    """
    whole, part = load.elements, load.part
    small = sum(n for n in load.passes.parameters if n < KEPT_WHOLE)
    for activations, done in load.snapshots:
        gathered = min(max(whole - small - done, 0), LIVE)
        copied = not done or done >= load.bucket
        buffers = load.bucket * (2 if copied else 1)
        yield _memory(part + small + gathered, part, 3 * part, buffers, activations)
    yield _memory(part + small, part, 3 * part, 2 * load.bucket, 0)
    yield _memory(part + small, 2 * part, 3 * part, load.bucket, 0)


def _memory(weights: float, gradients: float, optimizer: float, buffers: float, activations: float) -> Memory:
    """From elements, but for the activations, which are bytes."""
    return Memory(weights * FLOAT, gradients * FLOAT, optimizer * FLOAT, buffers * FLOAT, activations)


ENGINES: dict[str, Callable[[Load], Iterator[Memory]]] = {
    "ddp": of_ddp,
    "zero1": of_zero1,
    "zero2": of_zero2,
    "zero3": of_zero3,
}
"""From the simplest to the one that shares most."""


def peak(engine: str, passes: Sequence[Passes], tiles: int, workers: int, micro_batches: int) -> Memory:
    """What a worker holds at most with micro-batches of so many tiles, so many of them a step."""
    loads = [Load(p, tiles, workers, micro_batches > 1) for p in passes]
    return max((memory for load in loads for memory in ENGINES[engine](load)), key=lambda memory: memory.total)
