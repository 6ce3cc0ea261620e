"""MP-MAE: published parameter counts, errors of the builder, initialisation."""

from fnmatch import fnmatchcase
from typing import Any

import pytest
import torch

from mmearth_ray.modalities import tasks
from mmearth_ray.model.mpmae import FIRST_BIAS, MPMAE, PUBLISHED_WIDE, build_mpmae, initialise

TARGETS = tasks()
COMMON: dict[str, Any] = {"in_channels": 12, "targets": TARGETS}


@pytest.mark.parametrize(
    ("size", "image", "patch", "targets", "count"),
    [
        ("atto", 56, 8, 12, 7_580_674),
        ("atto", 112, 16, 12, 11_914_618),
        ("atto", 56, 8, 1, 6_078_601),
        ("tiny", 56, 8, 12, 32_291_834),
        ("tiny", 112, 16, 12, 36_625_946),
    ],
)
def test_parameter_counts_are_the_published_ones(size: str, image: int, patch: int, targets: int, count: int) -> None:
    with torch.device("meta"):
        model = build_mpmae(size=size, in_channels=12, image_size=image, patch_size=patch, targets=TARGETS[:targets])
    assert sum(p.numel() for p in model.parameters()) + targets == count  # the published total has the log-variances


def test_forward_predicts_every_target() -> None:
    model = build_mpmae(size="atto", image_size=24, patch_size=8, decoder_width=32, **COMMON)
    initialise(model, "uniform", torch.Generator().manual_seed(0))
    predictions = model(torch.randn(2, 12, 24, 24), torch.tensor([[0, 4], [3, 8]]), torch.tensor([[1, 2], [0, 5]]))
    assert set(predictions) == {m.name for m in TARGETS}
    assert all(p.isfinite().all() for p in predictions.values())
    assert predictions[TARGETS[0].name].shape == (2, 2, 64, 12)


def test_errors_name_value_bound_and_remedy() -> None:
    with pytest.raises(ValueError, match="no encoder size 'vit'; use one of atto, femto"):
        build_mpmae(size="vit", image_size=56, patch_size=8, **COMMON)
    with pytest.raises(ValueError, match="8, 16, 32 pixels wide; got 7"):
        build_mpmae(size="atto", image_size=56, patch_size=7, **COMMON)
    with pytest.raises(ValueError, match="multiples of the patch size 16; got 56: crop to 48 or pad to 64"):
        build_mpmae(size="atto", image_size=56, patch_size=16, **COMMON)
    with pytest.raises(ValueError, match="no initialisation 'best'; use one of uniform, published"):
        initialise(_small(), "best", torch.Generator())


def _small() -> MPMAE:
    return build_mpmae(size="atto", image_size=16, patch_size=8, decoder_width=64, **COMMON)


@pytest.mark.parametrize("scheme", ["uniform", "published"])
def test_initialisation_follows_its_table(scheme: str) -> None:
    model = _small()
    initialise(model, scheme, torch.Generator().manual_seed(0))
    parameters = dict(model.named_parameters())
    wide = 0.88 if scheme == "published" else 0.02  # a standard normal cut at -2 and 2 has a deviation of 0.8796
    expected = {
        "encoder.initial_conv.0.weight": 0.02,
        "encoder.stem.0.weight": wide,
        "encoder.downsample_layers.1.1.weight": 0.02,
        "encoder.stages.2.3.dwconv.weight": wide,
        "encoder.stages.3.1.pwconv1.weight": wide,
        "encoder.stages.3.1.pwconv2.weight": wide,
        "decoder.projection.weight": wide,
        "decoder.mask_token": 0.02,
        "decoder.blocks.0.dwconv.weight": wide,
        "decoder.blocks.0.pwconv1.weight": 0.02,
        "decoder.blocks.0.pwconv2.weight": 0.02,
        f"decoder.pixel_heads.{TARGETS[0].name}.weight": wide,
        "decoder.image_heads.biome.weight": 0.02,
    }
    for name, std in expected.items():
        loose = 0.3 if parameters[name].numel() < 100 else 0.1
        assert parameters[name].std().item() == pytest.approx(std, rel=loose), name
        assert parameters[name].abs().max() <= 2, name
    for name, parameter in parameters.items():
        if parameter.ndim == 1 and name not in ("decoder.mask_token", *FIRST_BIAS):
            assert (parameter == (1 if name.endswith("weight") else 0)).all(), name


@pytest.mark.parametrize("scheme", ["uniform", "published"])
def test_a_patch_without_data_does_not_blow_up_the_first_gradient(scheme: str) -> None:
    """Its cells are zero; without a first bias every norm would multiply gradients by 1000."""
    model = _small()
    initialise(model, scheme, torch.Generator().manual_seed(0))
    encoder, image = model.encoder, torch.randn(2, 12, 16, 16, generator=torch.Generator().manual_seed(1))
    image[0, :, :8] = 0
    norms = []
    for b in range(2):
        gradients = torch.autograd.grad(encoder(image[b : b + 1]).square().mean(), list(encoder.parameters()))
        norms.append(max(g.abs().max().item() for g in gradients))
    assert norms[0] < 100 * norms[1]


def test_every_published_pattern_matches_a_parameter() -> None:
    names = [name for name, _ in _small().named_parameters()]
    assert all(any(fnmatchcase(name, pattern) for name in names) for pattern in PUBLISHED_WIDE)


def test_initialisation_depends_on_the_generator_alone() -> None:
    first, second, other = _small(), _small(), _small()
    for model, seed in ((first, 7), (second, 7), (other, 8)):
        initialise(model, "uniform", torch.Generator().manual_seed(seed))
    pairs = list(zip(first.parameters(), second.parameters(), other.parameters(), strict=True))
    assert all(torch.equal(a, b) for a, b, _ in pairs)
    assert not all(torch.equal(a, c) for a, _, c in pairs)
