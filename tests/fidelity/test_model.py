"""The model against the defects of the published one: GRN of neighbours, a grid that shrinks, sites that would spread."""

import pytest
import torch
from tensors import assert_near, draw_patches, randomise

from mmearth_ray.modalities import tasks
from mmearth_ray.model.dense import DenseEncoder
from mmearth_ray.model.encoder import STEMS, Encoder, Stem
from mmearth_ray.model.layers import GRN, SCOPES, DenseLayout, DepthwiseConv, ImageConv, PackedLayout
from mmearth_ray.model.mpmae import build_mpmae, with_decoder

DEPTHS, DIMS = (1, 1, 2, 1), (8, 16, 24, 32)


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(9)


def _grns(module: torch.nn.Module) -> list[GRN]:
    return [layer for layer in module.modules() if isinstance(layer, GRN)]


@pytest.mark.parametrize("seen", ["some patches", "whole images"])
def test_features_of_an_image_do_not_depend_on_its_neighbours(seen: str, generator: torch.Generator) -> None:
    encoder = Encoder(5, DEPTHS, DIMS, 8)
    randomise(encoder, generator)
    image = torch.randn(3, 5, 32, 32, generator=generator)
    visible = draw_patches(3, 16, 6, generator)[0] if seen == "some patches" else None
    together = encoder(image, visible)
    for i in range(3):
        alone = encoder(image[i : i + 1], None if visible is None else visible[i : i + 1])
        assert_near(together[i], alone[0], 1e-5)


def test_batch_wide_grn_makes_them_depend_as_published(generator: torch.Generator) -> None:
    """The switch changes the encoder alone: one image gives the same numbers, an image among others does not."""
    one, all_ = (Encoder(5, DEPTHS, DIMS, 8, grn=scope) for scope in SCOPES)
    randomise(one, generator)
    all_.load_state_dict(one.state_dict())
    image, (visible, _) = torch.randn(3, 5, 32, 32, generator=generator), draw_patches(3, 16, 6, generator)
    assert_near(all_(image[:1], visible[:1]), one(image[:1], visible[:1]), 1e-5)
    together, alone = all_(image, visible)[0], all_(image[:1], visible[:1])[0]
    assert (together - alone).abs().max() > 1e-3
    decoder = with_decoder(all_, tasks(), width=16).decoder
    assert [grn.over for grn in _grns(decoder)] == [SCOPES["image"]]


def test_grn_has_one_eps_in_the_encoder_and_another_in_the_decoder() -> None:
    with torch.device("meta"):
        model = build_mpmae(size="atto", in_channels=12, image_size=56, patch_size=8, targets=tasks())
        dense = DenseEncoder(12, DEPTHS, DIMS)
    assert {grn.eps for grn in _grns(model.encoder)} == {grn.eps for grn in _grns(dense)} == {1e-6}
    assert {grn.eps for grn in _grns(model.decoder)} == {1e-4}


@pytest.mark.parametrize("targets", [1, 12])
def test_the_decoder_has_one_block_for_all_tasks(targets: int) -> None:
    with torch.device("meta"):
        model = build_mpmae(size="atto", in_channels=12, image_size=56, patch_size=8, targets=tasks()[:targets])
    assert len(model.decoder.blocks) == 1
    assert len(model.decoder.pixel_heads) + len(model.decoder.image_heads) == targets


@pytest.mark.parametrize("stem", STEMS)
@pytest.mark.parametrize(("side", "patch"), [(56, 8), (112, 16)])
def test_dense_features_have_the_grid_of_pretraining_and_equal_it(
    side: int, patch: int, stem: Stem, generator: torch.Generator
) -> None:
    encoder, dense = Encoder(4, DEPTHS, DIMS, patch, stem), DenseEncoder(4, DEPTHS, DIMS, patch, stem)
    randomise(encoder, generator)
    dense.load_state_dict(encoder.state_dict())
    image = torch.randn(2, 4, side, side, generator=generator)
    features = dense.forward_features(image)
    assert features.shape == (2, 32, 7, 7)
    everything = torch.arange(49).expand(2, -1)
    sparse = encoder(image, everything)  # (B, V, 1, 1, D)
    assert_near(features.flatten(2).transpose(1, 2), sparse.flatten(1, 3), 1e-5)


SPLIT = torch.tensor([[0, 2]])
"""The two visible patches of a strip of three: a hidden one lies between them."""


def test_a_hidden_patch_does_not_become_a_site(generator: torch.Generator) -> None:
    """Were sites to spread, four convolutions would carry the first visible patch across the hidden one to the other."""
    conv, packed, dense = DepthwiseConv(3), PackedLayout(SPLIT, (1, 3)), DenseLayout()
    randomise(conv, generator)
    image = torch.randn(1, 3, 8, 24, generator=generator)
    image[..., 8:16] = 0
    other = image.clone()
    other[..., :8] += 1
    found, spread = [], []
    for x, y in ((packed.pixels(i), dense.pixels(i)) for i in (image, other)):
        for _ in range(4):
            x, y = conv(x, packed), conv(y, dense)
        found.append(x)
        spread.append(y[..., 16:, :])
    assert found[0].shape == (1, 2, 8, 8, 3)
    assert not torch.equal(found[0][:, 0], found[1][:, 0])
    assert torch.equal(found[0][:, 1], found[1][:, 1])
    assert not torch.equal(*spread)  # with zeros in place of sites that do not exist it would


def test_hidden_pixels_do_not_reach_the_first_convolution(generator: torch.Generator) -> None:
    conv, packed = ImageConv(3, 4), PackedLayout(SPLIT, (1, 3))
    image = torch.randn(1, 3, 8, 24, generator=generator)
    other = image.clone()
    other[..., 8:16] += 1
    assert conv(image, packed).shape == (1, 2, 8, 8, 4)
    assert torch.equal(conv(image, packed), conv(other, packed))
    assert not torch.equal(conv(image, DenseLayout()), conv(other, DenseLayout()))
