"""A training step without Ray: tiles per second, its parts, and the packed encoder against the masked-dense one.

    python -m benchmarks.bench_step [key=value ...]      --help lists the keys

Everything is measured in one process, in turn, round after round; ratios are medians of the rounds' own ratios, so that
a machine whose speed drifts does not move them.
"""

import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.masked_dense import encode
from benchmarks.record import circumstances, table, write
from benchmarks.subject import INPUT, build, make_batch
from mmearth_ray import settings
from mmearth_ray.errors import run_command
from mmearth_ray.model.encoder import SIZES, Encoder
from mmearth_ray.objective import Objective
from mmearth_ray.settings import key


@dataclass(frozen=True)
class Options:
    size: str = key("atto", "encoder size", among=tuple(SIZES))
    shapes: list[str] = key(["56/8", "112/16"], "image and patch size of each measurement, as IMAGE/PATCH")
    batch: int = key(32, "tiles per step", at_least=1)
    rounds: int = key(5, "rounds that count, after one that does not", at_least=1)
    save: bool = key(True, "write the result to benchmarks/results/")


def main(arguments: list[str]) -> int:
    if {"-h", "--help"} & set(arguments):
        print(f"{__doc__}\n{settings.help_text(Options)}")
        return 0
    options = settings.load(Options, [], arguments)
    about = circumstances("benchmarks.bench_step")
    rows = [measure(options, *map(int, shape.split("/"))) for shape in options.shapes]
    print("\n".join(table(rows)))
    if options.save:
        print(f"written to {write('step', about, rows)}")
    return 0


def measure(options: Options, image_size: int, patch_size: int) -> dict[str, float | str | int]:
    """One row: medians over the rounds, in tiles per second, and the share of a step that each part takes."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    objective = build(options.size, image_size, patch_size).to(device)
    optimizer = torch.optim.AdamW(objective.parameters(), lr=1e-4, fused=True)
    batch = {name: t.to(device) for name, t in make_batch(options.batch, image_size, patch_size).items()}
    totals = objective.valid_counts(batch).sum(0)
    encoder = objective.model.encoder
    image = objective.readers[INPUT.name](batch).truth
    parts: dict[str, Callable[[], None]] = {
        "forward": lambda: _forward(objective, batch, totals),
        "forward and backward": lambda: objective(batch, totals, 1.0)[0].backward(),
        "step": lambda: _step(objective, optimizer, batch, totals),
        "packed encoder": lambda: encoder(image, batch["visible"]).sum().backward(),
        "masked-dense encoder": lambda: _masked_dense(encoder, options.size, image, batch["visible"], patch_size),
    }
    times: dict[str, list[float]] = {name: [] for name in parts}
    for number in range(options.rounds + 1):
        for name, part in parts.items():
            took = _time(part, device)
            if number:
                times[name].append(took)
    rate = {name: options.batch / statistics.median(values) for name, values in times.items()}
    ratios = [dense / packed for dense, packed in zip(times["masked-dense encoder"], times["packed encoder"], strict=True)]
    return {
        "size": options.size, "image/patch": f"{image_size}/{patch_size}", "batch": options.batch,
        "step tiles/s": rate["step"],
        "forward ms": 1e3 * statistics.median(times["forward"]),
        "backward ms": 1e3 * (statistics.median(times["forward and backward"]) - statistics.median(times["forward"])),
        "optimizer ms": 1e3 * (statistics.median(times["step"]) - statistics.median(times["forward and backward"])),
        "packed encoder tiles/s": rate["packed encoder"], "masked-dense encoder tiles/s": rate["masked-dense encoder"],
        "packed / masked-dense": statistics.median(ratios),
    }  # fmt: skip


def _time(part: Callable[[], None], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    begin = time.perf_counter()
    part()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - begin


def _forward(objective: Objective, batch: dict[str, Tensor], totals: Tensor) -> None:
    with torch.no_grad():
        objective(batch, totals, 1.0)


def _step(objective: Objective, optimizer: torch.optim.Optimizer, batch: dict[str, Tensor], totals: Tensor) -> None:
    objective(batch, totals, 1.0)[0].backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def _masked_dense(encoder: Encoder, size: str, image: Tensor, visible: Tensor, patch_size: int) -> None:
    patches = (image.shape[-1] // patch_size) ** 2
    seen = torch.zeros(len(image), patches, device=image.device).scatter(1, visible, 1.0)
    encode(dict(encoder.named_parameters()), image, seen, patch_size, SIZES[size].depths).sum().backward()


if __name__ == "__main__":
    sys.exit(run_command(main, sys.argv[1:]))
