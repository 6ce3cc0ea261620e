"""Dense use: maps equal to the sparse encoder's, timm's conventions, any size, autocast, compiling, normalisation."""

from copy import deepcopy
from typing import Any

import pytest
import torch
from tensors import assert_near, randomise
from timm_import import timm
from torch import Tensor

from mmearth_ray.errors import DataError, UsageError
from mmearth_ray.modalities import DEFAULT_INPUT, get
from mmearth_ray.model.dense import DenseEncoder, create_encoder
from mmearth_ray.model.encoder import PATCH_SIZES, SIZES, STEMS, Encoder, Stem
from mmearth_ray.model.features import FeatureEncoder
from mmearth_ray.model.normalise import Inputs, Normalise

DEPTHS, DIMS = (1, 1, 2, 1), (8, 16, 24, 32)


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(5)


def maps_of_patches(x_BVQQD: Tensor, rows: int, columns: int) -> Tensor:
    """Blocks of all patches of an image, row-major, back in their places: (B, R S, Q, Q, D) -> (B, D, R Q, S Q)."""
    cells = x_BVQQD.shape[2]
    x_BRSQQD = x_BVQQD.unflatten(1, (rows, columns))
    return x_BRSQQD.permute(0, 5, 1, 3, 2, 4).reshape(len(x_BVQQD), -1, rows * cells, columns * cells)


@pytest.mark.parametrize("grid", [(3, 3), (2, 5)])
@pytest.mark.parametrize("stem", STEMS)
@pytest.mark.parametrize("patch", PATCH_SIZES)
def test_maps_of_all_stages_equal_the_sparse_encoder_that_sees_everything(
    patch: int, stem: Stem, grid: tuple[int, int], generator: torch.Generator
) -> None:
    sparse = Encoder(3, DEPTHS, DIMS, patch, stem)
    randomise(sparse, generator)
    dense, listed = DenseEncoder(3, DEPTHS, DIMS, patch, stem), FeatureEncoder(3, DEPTHS, DIMS, patch, stem)
    for encoder in (dense, listed):
        assert list(encoder.state_dict()) == list(sparse.state_dict())
        encoder.load_state_dict(sparse.state_dict())
    rows, columns = grid
    image = torch.randn(2, 3, rows * patch, columns * patch, generator=generator)
    stages = sparse.stages_of(image, torch.arange(rows * columns).expand(2, -1))
    expected = [maps_of_patches(x_BVQQD, rows, columns) for x_BVQQD in stages]
    for i, (actual, wanted) in enumerate(zip(listed(image), expected, strict=True)):
        assert_near(actual, wanted, 1e-5, f"stage {i}")
    assert_near(dense.forward_features(image), expected[-1], 1e-5)
    assert_near(dense(image), expected[-1].mean((2, 3)), 1e-5)


def test_an_image_does_not_depend_on_its_batch(generator: torch.Generator) -> None:
    encoder = DenseEncoder(3, DEPTHS, DIMS)
    randomise(encoder, generator)
    images = torch.randn(3, 3, 24, 16, generator=generator)
    assert_near(encoder(images)[:1], encoder(images[:1]), 1e-5)


def test_the_head_pools_then_normalises_then_classifies(generator: torch.Generator) -> None:
    encoder = DenseEncoder(3, DEPTHS, DIMS, num_classes=5)
    randomise(encoder, generator)
    image = torch.randn(2, 3, 16, 24, generator=generator)
    x_BDHW = encoder.forward_features(image)
    pooled = encoder.head.norm(x_BDHW.mean((2, 3)))
    assert torch.equal(encoder.forward_head(x_BDHW, pre_logits=True), pooled)
    assert torch.equal(encoder(image), encoder.get_classifier()(pooled))
    assert encoder(image).shape == (2, 5)
    extra = set(encoder.state_dict()) - set(Encoder(3, DEPTHS, DIMS, 8).state_dict())
    assert extra == {f"head.{part}.{name}" for part in ("norm", "fc") for name in ("weight", "bias")}


def test_the_classifier_is_replaced_and_removed() -> None:
    encoder = DenseEncoder(3, DEPTHS, DIMS, num_classes=5).to(torch.float64)
    norm = encoder.head.norm
    encoder.reset_classifier(9)
    assert encoder.head.norm is norm  # as in timm
    assert encoder.get_classifier().weight.shape == (9, 32)
    assert encoder.get_classifier().weight.dtype == torch.float64
    assert (encoder.num_classes, encoder.pretrained_cfg["num_classes"]) == (9, 9)
    encoder.reset_classifier(0)
    assert not [name for name in encoder.state_dict() if name.startswith("head")]
    image = torch.zeros(1, 3, 16, 8, dtype=torch.float64)
    assert encoder(image).shape == (1, 32)
    encoder.reset_classifier(0, "")
    assert encoder(image).shape == (1, 32, 2, 1)
    with pytest.raises(ValueError, match="'avg', or '' where there are no classes; got '' and 3 classes"):
        encoder.reset_classifier(3)
    with pytest.raises(ValueError, match="got 'max' and 0"):
        encoder.reset_classifier(0, "max")


@pytest.mark.parametrize("stop_early", [False, True])
@pytest.mark.parametrize("indices", [None, 2, [1], [0, -1], (2, 1)])
def test_intermediates_follow_timm(indices: int | list[int] | None, stop_early: bool, generator: torch.Generator) -> None:
    with torch.device("meta"):
        theirs: Any = timm.create_model("convnextv2_atto", num_classes=0, depths=DEPTHS, dims=DIMS)
        timms_final, timms = theirs.forward_intermediates(torch.empty(1, 3, 64, 32), indices, stop_early=stop_early)
    encoder = DenseEncoder(3, DEPTHS, DIMS, 32, "original")
    image = torch.randn(1, 3, 64, 32, generator=generator)
    final, found = encoder.forward_intermediates(image, indices, stop_early=stop_early)
    assert isinstance(final, Tensor)
    assert final.shape == timms_final.shape
    assert [x.shape for x in found] == [x.shape for x in timms]
    maps = encoder.maps(image)
    assert all(any(torch.equal(x, y) for y in maps) for x in found)
    only = encoder.forward_intermediates(image, indices, intermediates_only=True)
    assert isinstance(only, list)
    assert all(torch.equal(a, b) for a, b in zip(only, found, strict=True))


def test_stages_that_there_are_not_are_refused() -> None:
    encoder, image = DenseEncoder(3, DEPTHS, DIMS), torch.zeros(1, 3, 8, 8)
    for wrong in (0, 5, [4], [-5], []):
        with pytest.raises(ValueError, match=r"stages 0 to 3, or the last 1 to 4"):
            encoder.forward_intermediates(image, wrong)
    with pytest.raises(ValueError, match="must be 'NCHW'; got 'NHWC'"):
        encoder.forward_intermediates(image, output_fmt="NHWC")


@pytest.mark.parametrize("indices", [None, (0,), (1, 3), (0, 2), (-1,)])
def test_lists_of_maps_describe_themselves_as_timms_do(indices: tuple[int, ...] | None) -> None:
    with torch.device("meta"):
        ours = create_encoder("atto", in_channels=3, patch_size=32, stem="original", features_only=True, out_indices=indices)
        theirs: Any = timm.create_model("convnextv2_atto", features_only=True, out_indices=indices or (0, 1, 2, 3))
        image = torch.empty(1, 3, 64, 32)
        assert [x.shape for x in ours(image)] == [x.shape for x in theirs(image)]
    for method in ("channels", "reduction", "module_name", "get_dicts"):
        assert getattr(ours.feature_info, method)() == getattr(theirs.feature_info, method)()
    assert ours.feature_info[0] == {"num_chs": 40, "reduction": 4, "module": "stages.0", "index": 0}
    assert ours.feature_info.channels(0) == 40
    assert ours.feature_info.channels([0]) == [40]


@pytest.mark.parametrize("patch", PATCH_SIZES)
def test_reductions_are_the_strides_of_the_maps(patch: int) -> None:
    encoder = FeatureEncoder(3, DEPTHS, DIMS, patch, out_indices=(1, 2))
    shapes = [tuple(x.shape[1:]) for x in encoder(torch.zeros(1, 3, 2 * patch, 3 * patch))]
    info = encoder.feature_info
    cells = zip(info.channels(), info.reduction(), strict=True)
    assert shapes == [(width, 2 * patch // side, 3 * patch // side) for width, side in cells]
    assert not any(name.startswith("stages.3") for name in encoder.state_dict())  # nobody needs it


@pytest.mark.parametrize("coarse", [False, True])
def test_groups_of_parameters_are_timms(coarse: bool) -> None:
    from timm.models import group_parameters

    from mmearth_ray.model.timm_names import to_timm

    with torch.device("meta"):
        ours = create_encoder("atto", in_channels=3, patch_size=32, stem="original", num_classes=2)
        theirs: Any = timm.create_model("convnextv2_atto", num_classes=2)
    renamed = dict(zip(ours.state_dict(), to_timm(ours.state_dict()), strict=True))
    found = group_parameters(ours, ours.group_matcher(coarse))
    expected = group_parameters(theirs, theirs.group_matcher(coarse))
    assert {n: {renamed[name] for name in names} for n, names in found.items()} == {n: set(v) for n, v in expected.items()}


def test_autocast_keeps_gradients_and_nearly_the_numbers(generator: torch.Generator) -> None:
    encoder = FeatureEncoder(3, DEPTHS, DIMS)
    randomise(encoder, generator)
    image = torch.randn(2, 3, 32, 24, generator=generator)
    with torch.autocast("cpu", torch.bfloat16):
        maps = encoder(image)
    for found, expected in zip(maps, encoder(image), strict=True):
        assert (found - expected).norm() < 0.02 * expected.norm()  # bfloat16 has 8 bits
    maps[-1].float().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in encoder.parameters())


def test_it_exports_with_free_batch_and_sides(generator: torch.Generator) -> None:
    encoder = DenseEncoder(3, (1, 1, 1, 1), DIMS, 16, num_classes=4)
    randomise(encoder, generator)
    batch, rows, columns = (torch.export.Dim(name) for name in ("batch", "rows", "columns"))
    free = {0: batch, 2: 16 * rows, 3: 16 * columns}
    program = torch.export.export(encoder, (torch.zeros(2, 3, 32, 48),), dynamic_shapes={"image_BCHW": free})
    image = torch.randn(1, 3, 64, 32, generator=generator)
    assert_near(program.module()(image), encoder(image), 1e-5)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # PyTorch's own, while it traces
def test_it_traces_as_one_graph_with_gradients(generator: torch.Generator) -> None:
    encoder = FeatureEncoder(3, (1, 1), (8, 16))
    randomise(encoder, generator)
    image = torch.randn(1, 3, 16, 24, generator=generator)
    compiled = torch.compile(encoder, fullgraph=True, backend="aot_eager")  # needs no compiler of C++
    for found, expected in zip(compiled(image), encoder(image), strict=True):
        assert_near(found, expected, 1e-5)
    gradients = [
        torch.autograd.grad(model(image)[-1].square().sum(), list(encoder.parameters())) for model in (compiled, encoder)
    ]
    for found, expected in zip(*gradients, strict=True):
        assert_near(found, expected, 1e-4)


def test_a_copy_stands_on_its_own(generator: torch.Generator) -> None:
    encoder = DenseEncoder(3, DEPTHS, DIMS)
    randomise(encoder, generator)
    copied, image = deepcopy(encoder), torch.randn(1, 3, 8, 8, generator=generator)
    expected = encoder(image)
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.fill_(0)
    assert torch.equal(copied(image), expected)


@pytest.mark.parametrize("size", SIZES)
def test_every_size_has_the_bands_of_the_input_and_says_what_it_takes(size: str) -> None:
    with torch.device("meta"):
        encoder = create_encoder(size, patch_size=16)
        row = get(DEFAULT_INPUT).default_bands()
        assert encoder.bands == row.bands
        assert encoder(torch.empty(2, len(row.bands), 48, 32)).shape == (2, encoder.num_features)
    config = encoder.pretrained_cfg
    assert config["input_size"] == (len(row.bands), 112, 112)
    for part in (config["first_conv"], config["classifier"]):
        encoder.get_submodule(part)


def test_chosen_bands_and_other_channels() -> None:
    encoder = create_encoder("atto", bands=("B4", "B3", "B2"), stem="original")
    assert encoder.bands == ("B4", "B3", "B2")
    encoder.get_submodule(encoder.pretrained_cfg["first_conv"])
    with pytest.raises(DataError, match="without statistics"):
        encoder.normalise()
    encoder = create_encoder("atto", in_channels=4)
    assert encoder.bands is None
    assert encoder(torch.zeros(1, 4, 8, 8)).shape == (1, 320)
    with pytest.raises(DataError, match="without statistics"):
        encoder.normalise("l2a")


def test_wrong_arguments_are_explained() -> None:
    with pytest.raises(ValueError, match="no encoder size 'micro'"):
        create_encoder("micro")
    with pytest.raises(ValueError, match="8, 16, 32 pixels wide; got 4"):
        create_encoder("atto", patch_size=4)
    with pytest.raises(ValueError, match="bands or in_channels, not both"):
        create_encoder("atto", bands=["B2"], in_channels=1)
    with pytest.raises(ValueError, match="must be distinct and among"):
        create_encoder("atto", bands=["B99"])
    with pytest.raises(ValueError, match="add features_only=True"):
        create_encoder("atto", out_indices=[1])  # pyright: ignore[reportArgumentType, reportCallIssue]
    with pytest.raises(ValueError, match="num_classes=3"):
        create_encoder("atto", num_classes=3, features_only=True)  # pyright: ignore[reportArgumentType, reportCallIssue]
    with pytest.raises(ValueError, match="3 channels cannot be the bands B2, B3"):
        DenseEncoder(3, DEPTHS, DIMS, inputs=Inputs(("B2", "B3")))
    with pytest.raises(ValueError, match="multiples of the patch size 8; got 60: crop to 56 or pad to 64"):
        create_encoder("atto", in_channels=3)(torch.zeros(1, 3, 64, 60))


def test_normalisation_knows_what_is_missing() -> None:
    normalise = Normalise([100, None, 10, 5], [50, None, 0, 2], missing=[0])
    raw = torch.tensor([[200, 7, 12, 0], [0, 0, 10, 9]], dtype=torch.uint16)[..., None, None]
    assert normalise(raw).flatten(1).tolist() == [[2, 0, 2, 0], [0, 0, 0, 2]]
    odd = torch.tensor([float("nan"), 3, float("inf"), float("-inf")])[:, None, None].expand(4, 2, 3)
    assert torch.equal(normalise(odd), torch.zeros(4, 2, 3))
    with pytest.raises(ValueError, match=r"must be \(..., 4, height, width\); got \(3, 2, 2\)"):
        normalise(torch.zeros(3, 2, 2))


def test_a_product_is_named_where_products_differ() -> None:
    low, high = {"mean": [1.0], "std": [2.0]}, {"mean": [3.0], "std": [2.0]}
    both = Inputs(("B2",), (0,), {"l1c": low, "l2a": high})
    assert both.normalise("l2a")(torch.full((1, 1, 1), 5.0)).item() == 1
    with pytest.raises(UsageError, match="differ by product; name one of l1c, l2a"):
        both.normalise()
    with pytest.raises(UsageError, match="no statistics of 'l3'; name one of l1c, l2a"):
        both.normalise("l3")
    assert Inputs(("B2",), (), {"l1c": low, "l2a": dict(low)}).normalise()(torch.full((1, 1, 1), 5.0)).item() == 2


def test_an_image_of_other_bands_is_refused_with_their_number() -> None:
    encoder = create_encoder("atto", in_channels=12)
    with pytest.raises(ValueError, match="an image of 3 channels, the encoder takes 12"):
        encoder(torch.zeros(1, 3, 48, 32))
