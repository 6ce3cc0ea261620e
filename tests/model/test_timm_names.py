"""Weights to timm's models and from them: the same names, the same numbers, and a refusal where there is no counterpart."""

from typing import Any

import pytest
import torch
from tensors import assert_near, randomise
from timm_import import timm

from mmearth_ray.model.dense import DenseEncoder, create_encoder
from mmearth_ray.model.encoder import SIZES
from mmearth_ray.model.timm_names import from_timm, to_timm


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(6)


def ours(size: str = "atto", num_classes: int = 0) -> DenseEncoder:
    return create_encoder(size, patch_size=32, stem="original", num_classes=num_classes)


@pytest.mark.parametrize("size", SIZES)
def test_names_and_shapes_are_timms_for_every_size(size: str) -> None:
    with torch.device("meta"):
        mine, theirs = ours(size, 3), timm.create_model(f"convnextv2_{size}", in_chans=12, num_classes=3)
    renamed, state = to_timm(mine.state_dict()), theirs.state_dict()
    assert {name: v.shape for name, v in renamed.items()} == {name: v.shape for name, v in state.items()}
    back = from_timm(state)
    assert {name: v.shape for name, v in back.items()} == {name: v.shape for name, v in mine.state_dict().items()}


@pytest.mark.parametrize("size", ["atto", "tiny"])  # timm holds the matrices of atto as convolutions
@pytest.mark.parametrize("num_classes", [0, 5])
def test_our_weights_give_the_same_features_in_timm(size: str, num_classes: int, generator: torch.Generator) -> None:
    depths, dims = (1, 1, 2, 1), SIZES[size].dims
    mine = DenseEncoder(12, depths, dims, 32, "original", num_classes=num_classes)
    randomise(mine, generator)
    theirs: Any = timm.create_model(f"convnextv2_{size}", in_chans=12, num_classes=num_classes, depths=depths)
    left = theirs.load_state_dict(to_timm(mine.state_dict()), strict=num_classes > 0)
    assert left.missing_keys == ([] if num_classes else ["head.norm.weight", "head.norm.bias"])
    image = torch.randn(2, 12, 64, 96, generator=generator)
    with torch.no_grad():
        assert_near(mine.forward_features(image), theirs.forward_features(image), 1e-5)
        if num_classes:
            assert_near(mine(image), theirs(image), 1e-5)
    back = from_timm(theirs.state_dict())
    assert set(back) == set(mine.state_dict())
    assert all(torch.equal(back[name], value) for name, value in mine.state_dict().items())


def test_timms_weights_give_the_same_features_here(generator: torch.Generator) -> None:
    theirs: Any = timm.create_model("convnextv2_atto", in_chans=12, num_classes=4)
    randomise(theirs, generator)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if name.endswith("grn.weight"):
                parameter -= 1
    mine = ours(num_classes=4)
    mine.load_state_dict(from_timm(theirs.state_dict()))
    image = torch.randn(2, 12, 96, 64, generator=generator)
    with torch.no_grad():
        assert_near(mine.forward_features(image), theirs.forward_features(image), 1e-5)
        assert_near(mine(image), theirs(image), 1e-5)


def test_lists_of_maps_take_weights_both_ways(generator: torch.Generator) -> None:
    mine = create_encoder("atto", patch_size=32, stem="original", features_only=True)
    randomise(mine, generator)
    theirs: Any = timm.create_model("convnextv2_atto", in_chans=12, features_only=True)
    theirs.load_state_dict(to_timm(mine.state_dict(), features_only=True))
    image = torch.randn(1, 12, 64, 32, generator=generator)
    with torch.no_grad():
        for found, expected in zip(mine(image), theirs(image), strict=True):
            assert_near(found, expected, 1e-5)
    back = from_timm(theirs.state_dict())
    assert set(back) == set(mine.state_dict())
    assert all(torch.equal(back[name], value) for name, value in mine.state_dict().items())


def test_constants_that_are_no_weights_agree() -> None:
    theirs: Any = timm.create_model("convnextv2_atto", num_classes=0)
    for model in (ours(), theirs):
        assert {part.eps for part in model.modules() if hasattr(part, "eps")} == {1e-6}


def test_other_networks_are_refused_with_what_to_do() -> None:
    with pytest.raises(ValueError, match=r"no stem like the modified one.*model.stem=original model.patch_size=32"):
        to_timm(create_encoder("atto").state_dict())
    with pytest.raises(ValueError, match="patches of 32 pixels; these weights are for 16"):
        to_timm(create_encoder("atto", patch_size=16, stem="original").state_dict())
    for name in ("convnext_atto", "resnet18"):
        with pytest.raises(ValueError, match=r"not weights of timm's convnextv2_\*"):
            from_timm(timm.create_model(name).state_dict())
