"""Where the time of a step goes: by part of the model, and by operator.

The parts follow one another, so a tensor at each border tells both ends: it is made in the forward pass when the part before
it is done, and its gradient is there in the backward pass when the part after it is.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from benchmarks.computations import Loss, Subject
from benchmarks.timing import Stopwatch, seconds, take_turns
from mmearth_ray.model.mpmae import MPMAE

READING, LAST, OPTIMIZER = "reading", "heads and losses", "optimizer"


def borders(model: MPMAE) -> dict[str, nn.Module]:
    """The module that each part ends with, in the order of the forward pass; what follows the last is heads and losses."""
    encoder = model.encoder
    stem = encoder.stem if hasattr(encoder, "stem") else encoder.stem_orig
    stages = {f"stage {number}": stage[-1] for number, stage in enumerate(encoder.stages, 1)}  # type: ignore[index]
    return {"stem": stem[-1], **stages, "decoder block": model.decoder.blocks[-1]}


def time_parts(subject: Subject, loss: Loss, rounds: int) -> dict[str, float]:
    """Milliseconds of each part of a step, forward and backward together: medians over the rounds."""
    laps = take_turns({"step": lambda watch: _marked_step(subject, loss, watch)}, rounds, subject.device)["step"]
    return {name: 1e3 * seconds(laps, name) for name in laps[0]}


def _marked_step(subject: Subject, loss: Loss, watch: Stopwatch) -> None:
    """A step whose watch is stopped at every border that is passed, there and back."""
    passed: list[str] = []

    def mark(name: str) -> Callable[[nn.Module, Any, Tensor], None]:
        def ended(module: nn.Module, inputs: Any, output: Tensor) -> None:
            watch.lap(name)
            passed.append(name)
            output.register_hook(lambda gradient: watch.lap(passed[passed.index(name) + 1]))

        return ended

    model = subject.objective.model
    with _hooks([model.encoder.register_forward_pre_hook(lambda module, inputs: watch.lap(READING))]
                + [module.register_forward_hook(mark(name)) for name, module in borders(model).items()]):  # fmt: skip
        value = loss()
        watch.lap(LAST)
        passed.append(LAST)
        value.backward()
    watch.lap(passed[0])
    subject.optimizer.step()
    subject.optimizer.zero_grad(set_to_none=True)
    watch.lap(OPTIMIZER)


@contextmanager
def _hooks(handles: list[Any]) -> Iterator[None]:
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def operators(subject: Subject, loss: Loss, most: int = 12) -> list[dict[str, str | int | float]]:
    """The operators of a step that take most time themselves: calls, milliseconds, and their share of the step."""
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if subject.device.type == "cuda" else [])]
    with profile(activities=activities) as profiler:
        loss().backward()
        subject.optimizer.step()
        subject.optimizer.zero_grad(set_to_none=True)
    kind = "self_device_time_total" if subject.device.type == "cuda" else "self_cpu_time_total"
    events = sorted(profiler.key_averages(), key=lambda event: getattr(event, kind), reverse=True)
    whole = sum(getattr(event, kind) for event in events)
    return [
        {"operator": e.key[:60], "calls": e.count, "ms": getattr(e, kind) / 1e3, "share": getattr(e, kind) / whole}
        for e in events[:most]
    ]
