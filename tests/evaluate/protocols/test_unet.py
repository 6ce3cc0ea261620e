"""The UNet's maps are as large as the image, of any encoder, and its skips are those that were published."""

from pathlib import Path

import pytest
import torch
from timm_import import timm

from mmearth_ray.evaluate.features.encoders import build, open_subject
from mmearth_ray.evaluate.features.timm_models import TimmEncoder
from mmearth_ray.evaluate.protocols.unet import UNet, levels
from mmearth_ray.model.dense import create_encoder


def image(channels: int, *sides: int) -> torch.Tensor:
    return torch.randn(2, channels, *sides, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("patch", [8, 16])
def test_levels_are_first_convolution_stem_and_stages_two_to_four(patch: int) -> None:
    encoder = build(open_subject(f"random:atto/{patch}"))
    x = image(12, 2 * patch, 3 * patch)
    with torch.no_grad():
        found = levels(encoder, x)
        maps = encoder.maps(x)  # type: ignore[operator]
    sides = [(2 * patch, 3 * patch), (16, 24), (8, 12), (4, 6), (2, 3)]
    assert [tuple(level.shape) for level in found] == [
        (2, width, *side) for width, side in zip((40, 40, 80, 160, 320), sides, strict=True)
    ]
    for level, expected in zip(found[2:], maps[1:], strict=True):
        assert torch.equal(level, expected)


@pytest.mark.parametrize("patch", [8, 16])
def test_scores_are_as_large_as_the_image_and_the_seed_decides(patch: int) -> None:
    state = torch.random.get_rng_state()
    models = [
        UNet(build(open_subject(f"random:atto/{patch}")), 12, patch, 5, torch.Generator().manual_seed(s)) for s in (0, 0, 1)
    ]
    x = image(12, 2 * patch, 3 * patch)
    first, same, other = (model(x) for model in models)
    assert first.shape == (2, 5, 2 * patch, 3 * patch)
    assert torch.equal(first, same)
    assert not torch.equal(first, other)
    assert torch.equal(state, torch.random.get_rng_state())
    assert models[0].decoder.last.out_channels == 20


def test_a_resting_encoder_has_no_gradient() -> None:
    model = UNet(build(open_subject("random:atto/8")), 12, 8, 2, torch.Generator().manual_seed(0))
    for resting in (True, False):
        model.resting = resting
        model(image(12, 16, 16)).square().sum().backward()
        gradients = [p.grad is not None and bool(p.grad.abs().sum() > 0) for p in model.encoder.parameters()]
        assert any(gradients) is not resting
        assert all(p.grad is not None for p in model.decoder.parameters())


def test_encoders_without_full_resolution_take_the_image_itself(tmp_path: Path) -> None:
    original = create_encoder("atto", in_channels=3, patch_size=16, stem="original").eval()
    other = TimmEncoder(timm.create_model("convnextv2_atto", num_classes=0), "convnextv2_atto").eval()
    for encoder, patch in ((original, 16), (other, 32)):
        x = image(3, 2 * patch, patch)
        assert torch.equal(levels(encoder, x)[0], x)
        assert UNet(encoder, 3, patch, 4, torch.Generator().manual_seed(0))(x).shape == (2, 4, 2 * patch, patch)


def test_the_last_layers_are_convolution_norm_gelu_and_a_head_of_small_weights() -> None:
    """As upstream's `initial_conv_upsample` and head, computed by hand."""
    decoder = UNet(build(open_subject("random:atto/8")), 12, 8, 2, torch.Generator().manual_seed(0), head_std=2e-5).decoder
    assert 0 < float(decoder.head.weight.detach().std()) < 3e-5
    narrow = decoder.last.in_channels
    seen: list[torch.Tensor] = []
    hook = decoder.last.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    widths = [40, 40, 80, 160, 320]
    generator = torch.Generator().manual_seed(1)
    maps = [torch.randn(1, w, s, s, generator=generator) for w, s in zip(widths, (16, 8, 4, 2, 1), strict=True)]
    found = decoder(maps, (16, 16))
    hook.remove()
    x = decoder.last(seen[0])
    x = (x - x.mean(1, keepdim=True)) / (x.var(1, unbiased=False, keepdim=True) + 1e-6).sqrt()
    expected = decoder.head(torch.nn.functional.gelu(x))
    assert narrow == seen[0].shape[1]
    assert torch.allclose(found, expected, atol=1e-8)
