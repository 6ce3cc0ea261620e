"""The minkowski backend: the same numbers as the packed one, where MinkowskiEngine is installed; a plain error where not."""

import os
import sys

import pytest
import torch
from tensors import assert_near, draw_patches, randomise
from torch import Tensor

from mmearth_ray.errors import UsageError
from mmearth_ray.model.encoder import PATCH_SIZES, STEMS, Backend, Encoder, Stem
from mmearth_ray.model.layers import SCOPES, PackedLayout, Scope
from mmearth_ray.model.minkowski import MinkowskiLayout, require_minkowski

DEPTHS, DIMS = (1, 1, 2, 1), (8, 16, 24, 32)
GRID, SHOWN = (4, 5), 8


@pytest.fixture
def engine() -> None:
    try:
        require_minkowski()
    except UsageError as error:
        pytest.skip(str(error))


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(4)


def _image(batch: int, patch: int, visible_BV: Tensor, generator: torch.Generator) -> Tensor:
    """Pixels of which a fifth are zero in every band, as are all of one visible patch."""
    image = torch.randn(batch, 5, GRID[0] * patch, GRID[1] * patch, generator=generator)
    image *= (torch.rand(batch, 1, *image.shape[2:], generator=generator) > 0.2).float()
    row, column = divmod(int(visible_BV[0, 0]), GRID[1])
    image[0, :, row * patch : (row + 1) * patch, column * patch : (column + 1) * patch] = 0
    return image.requires_grad_()


@pytest.mark.usefixtures("engine")
@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("stem", STEMS)
@pytest.mark.parametrize("patch", PATCH_SIZES)
def test_minkowski_equals_packed(patch: int, stem: Stem, batch: int, scope: Scope, generator: torch.Generator) -> None:
    encoders: dict[Backend, Encoder] = {
        backend: Encoder(5, DEPTHS, DIMS, patch, stem, grn=scope, backend=backend) for backend in ("packed", "minkowski")
    }
    randomise(encoders["packed"], generator)
    encoders["minkowski"].load_state_dict(encoders["packed"].state_dict())
    visible_BV, _ = draw_patches(batch, GRID[0] * GRID[1], SHOWN, generator)
    image = _image(batch, patch, visible_BV, generator)
    weights = torch.randn(batch, SHOWN, 1, 1, DIMS[-1], generator=generator)
    found: dict[Backend, dict[str, Tensor]] = {}
    for backend, encoder in encoders.items():
        names, parameters = zip(*encoder.named_parameters(), strict=True)
        output = encoder(image, visible_BV)
        gradients = torch.autograd.grad((output * weights).sum() / weights.numel() ** 0.5, (*parameters, image))
        found[backend] = {"output": output} | dict(zip((*names, "image"), gradients, strict=True))
    assert found["minkowski"].keys() == found["packed"].keys()
    for name, expected in found["packed"].items():
        assert_near(found["minkowski"][name], expected, 1e-5, name)


@pytest.mark.usefixtures("engine")
@pytest.mark.parametrize("stem", STEMS)
def test_hidden_pixels_neither_count_nor_get_a_gradient(stem: Stem, generator: torch.Generator) -> None:
    encoder = Encoder(5, DEPTHS, DIMS, 8, stem, backend="minkowski")
    randomise(encoder, generator)
    visible_BV, hidden_BN = draw_patches(2, GRID[0] * GRID[1], SHOWN, generator)
    image = _image(2, 8, visible_BV, generator)
    hidden = torch.zeros(2, GRID[0] * GRID[1], dtype=torch.bool).scatter(1, hidden_BN, True)
    hidden = hidden.view(2, 1, *GRID).repeat_interleave(8, 2).repeat_interleave(8, 3).expand_as(image)
    output = encoder(image, visible_BV)
    (gradient,) = torch.autograd.grad(output.square().sum(), image)
    assert (gradient[hidden] == 0).all()
    assert (gradient[~hidden] != 0).any()
    assert_near(encoder(image.masked_fill(hidden, float("nan")), visible_BV), output, 1e-5)


@pytest.mark.usefixtures("engine")
def test_the_same_step_gives_the_same_bits(generator: torch.Generator) -> None:
    encoder = Encoder(5, DEPTHS, DIMS, 16, backend="minkowski")
    randomise(encoder, generator)
    visible_BV, _ = draw_patches(3, GRID[0] * GRID[1], SHOWN, generator)
    image = _image(3, 16, visible_BV, generator)
    threads = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        steps = []
        for _ in range(3):
            output = encoder(image, visible_BV)
            steps.append((output, *torch.autograd.grad(output.square().sum(), (*encoder.parameters(), image))))
        assert torch.get_num_threads() == 4
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for again in steps[1:] for a, b in zip(again, steps[0], strict=True))


@pytest.mark.usefixtures("engine")
@pytest.mark.parametrize("cells", [8, 4, 2, 1])
def test_depthwise_convolutions_agree_in_double_precision(cells: int, generator: torch.Generator) -> None:
    visible_BV, _ = draw_patches(2, GRID[0] * GRID[1], SHOWN, generator)
    x = torch.randn(2, SHOWN, cells, cells, 3, generator=generator, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(3, 1, 7, 7, generator=generator, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(3, generator=generator, dtype=torch.float64, requires_grad=True)
    slopes = torch.randn(x.shape, generator=generator, dtype=torch.float64)
    found = []
    for layout in (MinkowskiLayout(visible_BV, GRID), PackedLayout(visible_BV, GRID)):
        y = layout.depthwise(x, weight, bias)
        found.append((y, *torch.autograd.grad((y * slopes).sum(), (x, weight, bias))))
    for name, actual, expected in zip(("output", "x", "weight", "bias"), *found, strict=True):
        assert_near(actual, expected, 1e-12, name)


@pytest.mark.usefixtures("engine")
@pytest.mark.parametrize(("kernel_size", "stride"), [(7, 1), (1, 1), (2, 2), (4, 4)])
def test_channelwise_convolutions_are_those_of_the_engines_own_class(
    kernel_size: int, stride: int, generator: torch.Generator
) -> None:
    engine = sys.modules["MinkowskiEngine"]
    visible_BV, _ = draw_patches(2, GRID[0] * GRID[1], SHOWN, generator)
    x = torch.randn(2, SHOWN, 8, 8, 3, generator=generator, requires_grad=True)
    weight = torch.randn(3, 1, kernel_size, kernel_size, generator=generator, requires_grad=True)
    layout = MinkowskiLayout(visible_BV, GRID)
    ours = layout.depthwise(x, weight, None) if stride == 1 else layout.inside(x, weight, None, groups=3)

    rows_NC = x.flatten(0, 3)
    image, patch, row, column = torch.unravel_index(torch.arange(len(rows_NC)), x.shape[:-1])
    corner = visible_BV[image, patch]
    sites = torch.stack([image, corner // GRID[1] * 8 + row, corner % GRID[1] * 8 + column], 1).int()
    module = engine.MinkowskiChannelwiseConvolution(3, kernel_size, stride, dimension=2)
    kernel_LC = torch.stack([weight[:, 0, a, b] for b in range(kernel_size) for a in range(kernel_size)])
    given = engine.SparseTensor(rows_NC, sites)
    found = torch.func.functional_call(module, {"kernel": kernel_LC}, (given,))
    theirs = dict(zip(map(tuple, found.C.tolist()), found.F, strict=True))
    expected = torch.stack([theirs[site] for site in map(tuple, sites.tolist()) if site in theirs]).view_as(ours)
    assert_near(ours, expected, 1e-5, "output")
    slopes = torch.randn(ours.shape, generator=generator)
    gradients = [torch.autograd.grad((y * slopes).sum() / 100, (x, weight)) for y in (ours, expected)]
    for name, actual, wanted in zip(("x", "weight"), *gradients, strict=True):
        assert_near(actual, wanted, 1e-5, name)


def test_where_the_engine_is_absent_the_error_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "MinkowskiEngine", None)
    with pytest.raises(UsageError, match=r"cannot be imported \(.*\); build it with 'make minkowski'.* model.backend=packed"):
        require_minkowski()
    with pytest.raises(UsageError, match="make minkowski"):
        Encoder(5, DEPTHS, DIMS, 8, backend="minkowski")


def test_a_broken_engine_is_an_error_with_its_reason(
    monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    place = tmp_path_factory.mktemp("broken")
    (place / "MinkowskiEngine.py").write_text(
        "import os\nfrom collections import Sequence\nos.environ['OMP_NUM_THREADS'] = '16'\n"
        "raise OSError('undefined symbol: _ZN3c10\\nmore')\n"
    )
    monkeypatch.syspath_prepend(str(place))
    monkeypatch.delitem(sys.modules, "MinkowskiEngine", raising=False)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    with pytest.raises(UsageError, match=r"\(undefined symbol: _ZN3c10\)"):
        require_minkowski()
    assert "OMP_NUM_THREADS" not in os.environ
    assert "MinkowskiEngine" not in sys.modules
