"""The encoder's backends side by side: packed, masked-dense, and minkowski where MinkowskiEngine is installed.

    python -m benchmarks.bench_backends [key=value ...]      --help lists the keys

Forward and backward of the encoder alone, with the same weights, images and visible patches, 60 % of patches hidden, float32,
on the CPU (where there is a GPU, set CUDA_VISIBLE_DEVICES= so that the record does not name it).  All are measured in one
process, in turn, round after round; ratios are medians of the rounds' own ratios, so that a machine whose speed drifts does
not move them.  A difference is the largest |a - b| / max(1, |b|), b being the packed backend's.

Shapes: B images, L patches, V of them visible, D channels.
"""

import importlib.metadata
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.masked_dense import encode
from benchmarks.record import circumstances, table, write
from mmearth_ray import settings
from mmearth_ray.errors import UsageError, run_command
from mmearth_ray.model.encoder import SIZES, Encoder, build_encoder
from mmearth_ray.model.minkowski import require_minkowski
from mmearth_ray.settings import key

BANDS, HIDDEN = 12, 0.6

Row = dict[str, float | str | int]


@dataclass(frozen=True)
class Options:
    size: str = key("atto", "encoder size", among=tuple(SIZES))
    shapes: list[str] = key(["56/8", "112/16"], "image and patch size of each measurement, as IMAGE/PATCH")
    batch: int = key(32, "tiles per step", at_least=1)
    rounds: int = key(5, "rounds that count, after one that does not", at_least=1)
    save: bool = key(True, "write the result to benchmarks/results/")


@dataclass(frozen=True)
class Case:
    """What every backend is given."""

    size: str
    patch_size: int
    image_BCHW: Tensor
    visible_BV: Tensor
    weights_BVD: Tensor
    """The loss is the sum of the features times these."""


Encode = Callable[[], tuple[Encoder, Tensor]]
"""An encoder and the features (B, V, D) that it computes."""


def main(arguments: list[str]) -> int:
    if {"-h", "--help"} & set(arguments):
        print(f"{__doc__}\n{settings.help_text(Options)}")
        return 0
    options = settings.load(Options, [], arguments)
    absent = why_absent()
    engine = importlib.metadata.version("MinkowskiEngine") if not absent else f"not measured: {absent}"
    about = circumstances("benchmarks.bench_backends") | {"MinkowskiEngine": engine}
    print(f"MinkowskiEngine: {engine}")
    rows = [row for shape in options.shapes for row in measure(options, *map(int, shape.split("/")), minkowski=not absent)]
    print("\n".join(table(rows)))
    if options.save:
        print(f"written to {write('backends', about, rows)}")
    return 0


def why_absent() -> str:
    """Why MinkowskiEngine cannot be measured; empty if it can."""
    try:
        require_minkowski()
    except UsageError as error:
        return str(error)
    return ""


def measure(options: Options, image_size: int, patch_size: int, *, minkowski: bool) -> list[Row]:
    """A row per backend: its speed, how many times as long as the packed one it takes, and how far it is from it."""
    case = draw_case(options.size, options.batch, image_size, patch_size)
    backends = {name: make for name, make in encoders(case).items() if minkowski or name != "minkowski"}
    expected = results(case, backends["packed"])
    found = {name: differences(results(case, make), expected) for name, make in backends.items()}
    times: dict[str, list[float]] = {name: [] for name in backends}
    for number in range(options.rounds + 1):
        for name, make in backends.items():
            begin = time.perf_counter()
            results(case, make)
            if number:
                times[name].append(time.perf_counter() - begin)
    return [
        {
            "size": options.size, "image/patch": f"{image_size}/{patch_size}", "batch": options.batch, "backend": name,
            "tiles/s": options.batch / statistics.median(times[name]),
            "times as long as packed": statistics.median(a / b for a, b in zip(times[name], times["packed"], strict=True)),
            "output difference": found[name][0], "gradient difference": found[name][1],
        }
        for name in backends
    ]  # fmt: skip


def draw_case(size: str, batch: int, image_size: int, patch_size: int) -> Case:
    """Random images with 60 % of their patches hidden."""
    generator = torch.Generator().manual_seed(0)
    patches = (image_size // patch_size) ** 2
    image = torch.randn(batch, BANDS, image_size, image_size, generator=generator)
    order = torch.rand(batch, patches, generator=generator).argsort(1)
    visible = order[:, : int(patches * (1 - HIDDEN))].sort().values
    weights = torch.randn(batch, visible.shape[1], SIZES[size].dims[-1], generator=generator)
    return Case(size, patch_size, image, visible, weights / weights.numel() ** 0.5)


def encoders(case: Case) -> dict[str, Encode]:
    """Every backend by name; the encoder of `minkowski` is built when it is first used."""
    packed = build_encoder(case.size, BANDS, case.patch_size)
    _randomise(packed)
    made: dict[str, Encoder] = {}

    def minkowski() -> tuple[Encoder, Tensor]:
        if not made:
            made["minkowski"] = build_encoder(case.size, BANDS, case.patch_size, backend="minkowski")
            made["minkowski"].load_state_dict(packed.state_dict())
        return made["minkowski"], made["minkowski"](case.image_BCHW, case.visible_BV).flatten(2)

    return {
        "packed": lambda: (packed, packed(case.image_BCHW, case.visible_BV).flatten(2)),
        "masked-dense": lambda: (packed, _masked_dense(packed, case)),
        "minkowski": minkowski,
    }


def _randomise(encoder: Encoder) -> None:
    """Weights of everyday size everywhere, so that no part is switched off by zeros."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in encoder.named_parameters():
            fan_in = parameter[0].numel() if parameter.ndim > 1 else 100
            parameter.normal_(0.0, fan_in**-0.5, generator=generator)
            if parameter.ndim == 1 and name.endswith("weight"):
                parameter += 1


def _masked_dense(encoder: Encoder, case: Case) -> Tensor:
    """Features (B, V, D) of the visible patches, by dense convolutions."""
    patches = case.image_BCHW[0, 0].numel() // case.patch_size**2
    seen_BL = torch.zeros(len(case.image_BCHW), patches).scatter(1, case.visible_BV, 1.0)
    parameters = dict(encoder.named_parameters())
    map_BDL = encode(parameters, case.image_BCHW, seen_BL, case.patch_size, SIZES[case.size].depths).flatten(2)
    return map_BDL.transpose(1, 2).gather(1, case.visible_BV[..., None].expand(-1, -1, map_BDL.shape[1]))


def results(case: Case, make: Encode) -> list[Tensor]:
    """The features, then the gradient of every parameter."""
    encoder, features_BVD = make()
    gradients = torch.autograd.grad((features_BVD * case.weights_BVD).sum(), list(encoder.parameters()))
    return [features_BVD.detach(), *gradients]


def differences(found: list[Tensor], expected: list[Tensor]) -> tuple[float, float]:
    """The largest difference in the features, and in any gradient."""
    worst = [float(((a - b).abs() / b.abs().clamp(min=1)).max()) for a, b in zip(found, expected, strict=True)]
    return worst[0], max(worst[1:])


if __name__ == "__main__":
    sys.exit(run_command(main, sys.argv[1:]))
