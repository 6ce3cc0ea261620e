"""The triton backend: the same numbers as the packed one, kernels that compile for a GPU, and plain errors where it cannot run.

The kernels run on the GPU if there is one, and otherwise in Triton's interpreter, which must be switched on before Triton is
imported.  So this file is also the program that runs them, in a process of its own: `results OUT` and `compiled OUT`.
"""

import importlib
import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from tensors import assert_near, draw_patches, randomise
from torch import Tensor

from mmearth_ray.config import load
from mmearth_ray.errors import UsageError
from mmearth_ray.model.encoder import Backend, Encoder
from mmearth_ray.model.layers import PackedLayout
from mmearth_ray.model.neighbours import find_neighbours
from mmearth_ray.model.triton_layout import TritonLayout, require_triton

TESTS = Path(__file__).parents[1]
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")


class Case(NamedTuple):
    """A convolution: cells along the side of a block, channels, the kernel, the grid, images and patches visible in each."""

    cells: int
    channels: int
    kernel: int = 7
    grid: tuple[int, int] = (3, 4)
    batch: int = 2
    shown: int = 5
    dtype: torch.dtype = torch.float32
    bias: bool = True
    scattered: bool = False  # neither features nor their gradient contiguous
    autocast: bool = False


CASES = {
    "8 cells": Case(8, 5, grid=(2, 3), batch=1, shown=3),
    "4 cells": Case(4, 5, grid=(3, 2), shown=2),
    "2 cells": Case(2, 5, shown=3),
    "1 cell": Case(1, 40, grid=(4, 5), shown=6),
    "more lanes than a tile": Case(2, 45, kernel=3, batch=1),
    "several tiles of blocks": Case(1, 40, kernel=3, grid=(5, 4), batch=3, shown=9),
    "everything visible": Case(2, 5, kernel=5, grid=(2, 3), batch=1, shown=6),
    "one patch": Case(4, 5, kernel=3, shown=1),
    "kernel 9": Case(1, 5, kernel=9, grid=(4, 6)),
    "kernel 5": Case(1, 5, kernel=5),
    "kernel 3": Case(4, 40, kernel=3, batch=1, shown=4),
    "kernel 1": Case(2, 5, kernel=1),
    "without bias": Case(2, 5, kernel=3, bias=False),
    "scattered": Case(2, 5, kernel=3, scattered=True),
    "bfloat16": Case(2, 40, kernel=3, shown=4, dtype=torch.bfloat16),
    "float16": Case(4, 5, kernel=5, shown=2, dtype=torch.float16),
    "autocast": Case(1, 40, kernel=3, autocast=True),
}
TOLERANCES = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 1e-2}
"""Of the largest value of an output or gradient: sums are float32, results are rounded to their type."""


def draw(case: Case) -> tuple[Tensor, dict[str, Tensor], Tensor]:
    """Visible patches; features, weight and perhaps bias, all of which take gradients; and the gradient of the output."""
    generator = torch.Generator().manual_seed(5)
    visible_BV, _ = draw_patches(case.batch, case.grid[0] * case.grid[1], case.shown, generator)
    x = torch.randn(case.batch, case.shown, case.cells, case.cells, case.channels, generator=generator)
    slopes = torch.randn(x.shape, generator=generator)
    if case.scattered:
        x, slopes = (t.movedim(4, 1).contiguous().movedim(1, 4) for t in (x, slopes))
    inputs = {"x": x, "weight": torch.randn(case.channels, 1, case.kernel, case.kernel, generator=generator) / case.kernel}
    if case.bias:
        inputs["bias"] = torch.randn(case.channels, generator=generator)
    return visible_BV, {name: t.to(case.dtype).requires_grad_() for name, t in inputs.items()}, slopes.to(case.dtype)


def results(layout: PackedLayout, inputs: dict[str, Tensor], slopes: Tensor) -> dict[str, Tensor]:
    """The output, then the gradients of the inputs."""
    output = layout.depthwise(inputs["x"], inputs["weight"], inputs.get("bias"))
    gradients = torch.autograd.grad(output, list(inputs.values()), slopes.to(output.dtype))
    return {"output": output.detach(), **dict(zip(inputs, gradients, strict=True))}


def triton_results(case: Case) -> dict[str, Tensor]:
    visible_BV, inputs, slopes = draw(case)
    layout = TritonLayout(visible_BV.to(DEVICE), case.grid)
    moved = {name: t.detach().to(DEVICE).requires_grad_() for name, t in inputs.items()}
    with torch.autocast(DEVICE.type, torch.bfloat16, enabled=case.autocast):
        return {name: t.cpu() for name, t in results(layout, moved, slopes.to(DEVICE)).items()}


def encoder_results(backend: Backend, device: torch.device) -> dict[str, Tensor]:
    """Features and gradients of a small encoder; weights, image and visible patches are always the same."""
    generator = torch.Generator().manual_seed(6)
    encoder = Encoder(3, (1, 1, 1, 1), (4, 8, 8, 16), 8, backend=backend)
    randomise(encoder, generator)
    visible_BV, _ = draw_patches(1, 6, 3, generator)
    image = torch.randn(1, 3, 16, 24, generator=generator).to(device).requires_grad_()
    output = encoder.to(device)(image, visible_BV.to(device))
    names, parameters = zip(*encoder.named_parameters(), strict=True)
    gradients = torch.autograd.grad(output.square().mean(), (image, *parameters))
    return {name: t.detach().cpu() for name, t in zip(("output", "image", *names), (output, *gradients), strict=True)}


def write_results(path: Path) -> None:
    """What the kernels compute in all cases, and an encoder with them."""
    kernels: Any = importlib.import_module("mmearth_ray.model.triton_depthwise")
    kernels.PROGRAMS = 3  # so that programs have shares of several blocks, and the last one a shorter share
    found = {name: triton_results(case) for name, case in CASES.items()}
    again = triton_results(CASES["kernel 3"])
    torch.save(found | {"again": again, "encoder": encoder_results("triton", DEVICE)}, path)


def write_compiled(path: Path) -> None:
    """What the compiler makes of the kernels for an H100, for atto's first and last stage in bfloat16, without a GPU."""
    kernels = importlib.import_module("mmearth_ray.model.triton_depthwise")
    backend, compiler = (importlib.import_module(f"triton.{name}") for name in ("backends.compiler", "compiler"))
    target, found = backend.GPUTarget("cuda", 90, 32), {}
    sides: dict[int, dict[str, Any]] = {8: {"Q": 8, "D": 40, "K": 7, "L": 64}, 1: {"Q": 1, "D": 320, "K": 7, "L": 64}}
    for cells, sizes in sides.items():
        for kernel, more in (
            (kernels._convolve, {"TURNED": True, "BIASED": True, "P": 8}),
            (kernels._correlate, {"T": 8}),
        ):
            names, constants = kernel.arg_names, sizes | more
            types = dict.fromkeys(names, "i32") | dict.fromkeys(("slots_ptr", "places_ptr"), "*i32")
            types |= dict.fromkeys(("x_ptr", "grad_ptr", "weight_ptr", "bias_ptr", "out_ptr"), "*bf16")
            types |= {"sums_ptr": "*fp32"} | dict.fromkeys(constants, "constexpr")
            aligned: dict[Any, Any] = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if "_ptr" in name}
            source = compiler.ASTSource(
                kernel, {name: types[name] for name in names}, {(names.index(n),): v for n, v in constants.items()}, aligned
            )
            made = compiler.compile(source, target=target, options=kernels.OPTIONS)
            found[f"{kernel.__name__}, {cells} cells"] = {"shared": made.metadata.shared, "ptx": made.asm["ptx"]}
    torch.save(found, path)


def run_here(task: str, folder: Path, **environment: str) -> Any:
    """Do a task of this file in a process of its own, and read what it wrote."""
    paths = os.pathsep.join(map(str, (TESTS, TESTS.parent)))
    environment |= {"PYTHONPATH": paths, "TRITON_CACHE_DIR": str(folder / "cache"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, __file__, task, str(folder / "out.pt")],
        env=os.environ | environment, capture_output=True, text=True, timeout=500, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return torch.load(folder / "out.pt")


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Tensor]]:
    interpreter = {} if DEVICE.type == "cuda" else {"TRITON_INTERPRET": "1"}
    return run_here("results", tmp_path_factory.mktemp("results"), **interpreter)


@needs_triton
@pytest.mark.parametrize("name", CASES)
def test_kernels_equal_the_packed_layout_in_double_precision(name: str, found: dict[str, dict[str, Tensor]]) -> None:
    case = CASES[name]
    visible_BV, inputs, slopes = draw(case)
    doubles = {n: t.detach().double().requires_grad_() for n, t in inputs.items()}
    expected = results(Reference(visible_BV, case.grid), doubles, slopes.double())
    assert found[name].keys() == expected.keys()
    kind = torch.bfloat16 if case.autocast else case.dtype
    for what, value in expected.items():
        actual = found[name][what]
        assert actual.dtype == (kind if what == "output" else case.dtype)
        assert_near(actual.double() / value.abs().max(), value / value.abs().max(), TOLERANCES[kind], what)


class Reference(PackedLayout):
    """Spread, convolved and collected in the plainest way."""

    def depthwise(self, x_BVQQD: Tensor, weight_D1KK: Tensor, bias_D: Tensor | None) -> Tensor:
        (rows, columns), (batch, _, cells, _, channels) = self.grid, x_BVQQD.shape
        map_BRSQQD = x_BVQQD.new_zeros(batch, rows * columns, cells, cells, channels)
        map_BRSQQD = map_BRSQQD.index_put((self.image_B1, self.visible_BV), x_BVQQD).unflatten(1, self.grid)
        map_BDHW = map_BRSQQD.permute(0, 5, 1, 3, 2, 4).reshape(batch, channels, rows * cells, columns * cells)
        half = weight_D1KK.shape[-1] // 2
        map_BDHW = torch.nn.functional.conv2d(map_BDHW, weight_D1KK, bias_D, padding=half, groups=channels)
        map_BDRQSQ = map_BDHW.unflatten(3, (columns, cells)).unflatten(2, (rows, cells))
        return map_BDRQSQ.permute(0, 2, 4, 3, 5, 1).flatten(1, 2)[self.image_B1, self.visible_BV]


@needs_triton
def test_the_same_convolution_gives_the_same_bits(found: dict[str, dict[str, Tensor]]) -> None:
    assert all(torch.equal(found["again"][what], value) for what, value in found["kernel 3"].items())


@needs_triton
def test_an_encoders_step_equals_that_of_the_packed_backend(found: dict[str, dict[str, Tensor]]) -> None:
    expected = encoder_results("packed", torch.device("cpu"))
    assert found["encoder"].keys() == expected.keys()
    for name, value in expected.items():
        assert_near(found["encoder"][name], value, 1e-5, name)


@needs_triton
def test_kernels_compile_for_a_gpu_and_threads_need_not_exchange_anything(tmp_path: Path) -> None:
    compiled = run_here("compiled", tmp_path, TRITON_INTERPRET="0")
    assert len(compiled) == 4
    for name, made in compiled.items():
        assert made["shared"] == 0, f"{name} moves values between threads"
        assert "ld.global.v2" in made["ptx"] or "ld.global.v4" in made["ptx"], f"{name} loads single values"


def test_the_index_holds_the_packed_patch_at_every_place() -> None:
    generator = torch.Generator().manual_seed(3)
    visible_BV, _ = draw_patches(3, 12, 5, generator)
    slots_BRS, places_BV = find_neighbours(visible_BV, (3, 4), 2)
    assert (slots_BRS.dtype, places_BV.dtype, slots_BRS.shape) == (torch.int32, torch.int32, (3, 7, 8))
    expected = torch.full((3, 7, 8), -1)
    for image, patches in enumerate(visible_BV.tolist()):
        for number, patch in enumerate(patches):
            expected[image, patch // 4 + 2, patch % 4 + 2] = image * 5 + number
    assert slots_BRS.tolist() == expected.tolist()
    assert slots_BRS.flatten()[places_BV].flatten().tolist() == list(range(15))


def test_where_triton_is_absent_the_error_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    with pytest.raises(
        UsageError, match=r"cannot be imported \(.*\); install it with 'pip install triton'.* model.backend=packed"
    ):
        require_triton()
    with pytest.raises(UsageError, match="pip install triton"):
        Encoder(5, (1, 1, 1, 1), (4, 8, 8, 16), 8, backend="triton")


def test_on_a_cpu_the_error_says_that_it_needs_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(UsageError, match=r"on GPUs with CUDA, not on 'cpu'; set train.gpus=true, or model.backend=packed"):
        TritonLayout(torch.zeros(1, 1, dtype=torch.int64), (1, 1))


def test_a_run_without_gpus_is_refused_before_it_begins(monkeypatch: pytest.MonkeyPatch) -> None:
    from mmearth_ray.train import room  # Ray: not in the process that runs the kernels

    with pytest.raises(UsageError, match=r"model.backend=triton runs on GPUs only; set train.gpus=true"):
        load(["model.backend=triton", "train.gpus=false"])
    one = room.Cluster((room.Amount(4, 1),), room.Amount(4, 1), 1e9)
    monkeypatch.setattr(room.ray, "cluster_resources", lambda: {"CPU": 4.0, "GPU": 1.0})
    monkeypatch.setattr(room, "cluster_now", lambda: one)
    found = room.wait_for_room(load(["model.backend=triton"]), room.uses_gpus(load(["model.backend=triton"])))
    assert found
    assert found.workers == 1
    config = load(["model.backend=triton", "train.workers=2", "train.wait=0"])
    with pytest.raises(UsageError, match=r"a GPU for each of train.workers=2, the cluster has 1; use fewer train.workers"):
        room.wait_for_room(config, room.uses_gpus(config))


if __name__ == "__main__":
    {"results": write_results, "compiled": write_compiled}[sys.argv[1]](Path(sys.argv[2]))
