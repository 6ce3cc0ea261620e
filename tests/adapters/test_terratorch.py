"""TerraTorch: the backbone, found by its name, alone and under the decoders of a real model factory."""

import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from interop import BANDS, draw_image, export, fit, load

from mmearth_ray import load_encoder
from mmearth_ray.errors import DataError, UsageError

NAME = "mmearth_ray_encoder"
TOLERANCE = 1e-6
ROUNDING = 1e-12  # of float64


@pytest.fixture(scope="module")
def registry() -> Any:
    """TerraTorch's registry of backbones, with ours in it."""
    load("terratorch", "mmearth_ray.adapters.terratorch")
    return load("terratorch", "terratorch.registry").BACKBONE_REGISTRY


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export(tmp_path_factory.mktemp("run") / "exported")


def test_without_terratorch_the_import_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "terratorch.registry", None)
    monkeypatch.delitem(sys.modules, "mmearth_ray.adapters.terratorch", raising=False)
    with pytest.raises(UsageError, match=r"terratorch is not installed; run: pip install 'mmearth-ray\[terratorch\]'"):
        import_module("mmearth_ray.adapters.terratorch")


@pytest.mark.parametrize("name", [NAME, f"terratorch_{NAME}"])
def test_the_registry_builds_the_encoder_that_load_encoder_gives(registry: Any, exported: Path, name: str) -> None:
    assert name in registry
    backbone = registry.build(name, checkpoint=str(exported))
    image = draw_image(2, 5, 24, 32)
    expected = load_encoder(exported, features_only=True)(image)
    assert backbone.out_channels == [m.shape[1] for m in expected] == [40, 80, 160, 320]
    maps = backbone(image, image_size=(24, 32))
    assert isinstance(maps, list)
    torch.testing.assert_close(maps, expected, rtol=0, atol=TOLERANCE)


def test_a_run_stands_for_its_export(registry: Any, exported: Path) -> None:
    image = draw_image(1, 5, 8, 8)
    first, second = (registry.build(NAME, checkpoint=path)(image)[-1] for path in (exported, exported.parent))
    torch.testing.assert_close(first, second, rtol=0, atol=0)


def test_out_indices_pick_the_maps(registry: Any, exported: Path) -> None:
    backbone = registry.build(NAME, checkpoint=exported, out_indices=[0, 2])
    image = draw_image(1, 5, 16, 16)
    whole = load_encoder(exported, features_only=True)(image)
    assert backbone.out_channels == [40, 160]
    torch.testing.assert_close(backbone(image), [whole[0], whole[2]], rtol=0, atol=TOLERANCE)
    assert registry.build(NAME, checkpoint=exported, out_indices=[-1]).out_channels == [320]


@pytest.mark.parametrize("stem", ["modified", "original"])
def test_some_bands_in_another_order_compute_what_all_do_where_the_others_are_0(
    registry: Any, tmp_path: Path, stem: str
) -> None:
    path, bands = export(tmp_path / "exported", stem=stem), ["B4", "B3", "B2"]
    backbone = registry.build(NAME, checkpoint=path, bands=bands).double()
    image, whole = draw_image(2, 3, 16, 24).double(), torch.zeros(2, 5, 16, 24).double()
    whole[:, [BANDS.index(band) for band in bands]] = image
    assert backbone.bands == tuple(bands)
    expected = load_encoder(path, features_only=True).double()(whole)
    torch.testing.assert_close(backbone(image), expected, rtol=0, atol=ROUNDING)


def test_it_normalises_raw_values_when_asked_to(registry: Any, exported: Path) -> None:
    raw = draw_image(1, 5, 8, 8).abs() * 1000
    raw[:, :, 0] = 0
    encoder = load_encoder(exported, features_only=True)
    backbone = registry.build(NAME, checkpoint=exported, normalise="l1c")
    torch.testing.assert_close(backbone(raw), encoder(encoder.normalise("l1c")(raw)), rtol=0, atol=TOLERANCE)


def test_what_does_not_fit_is_refused_by_name(registry: Any, exported: Path, tmp_path: Path) -> None:
    theirs = load("terratorch", "terratorch.datasets").HLSBands
    with pytest.raises(UsageError, match="no band BLUE, NIR_NARROW; it has B2, B3, B4, B8A, B8"):
        registry.build(NAME, checkpoint=exported, bands=[theirs.BLUE, theirs.NIR_NARROW, "B4"])
    with pytest.raises(UsageError, match="got none"):
        registry.build(NAME, checkpoint=exported, bands=[])
    with pytest.raises(UsageError, match="'l3'; name one of l1c, l2a"):
        registry.build(NAME, checkpoint=exported, normalise="l3")
    with pytest.raises(DataError, match="no exported model"):
        registry.build(NAME, checkpoint=tmp_path)


DECODERS = [
    ("UNetDecoder", {"decoder_channels": [32, 16, 16, 8]}),
    ("UperNetDecoder", {"decoder_channels": 16}),
    ("smp_FPN", {"decoder_pyramid_channels": 16, "decoder_segmentation_channels": 16}),
]


@pytest.mark.parametrize(("decoder", "arguments"), DECODERS, ids=[name for name, _ in DECODERS])
@pytest.mark.parametrize("side", [48, 56])  # 7 patches: TerraTorch pads to 8 and crops again
def test_a_segmentation_model_of_the_factory_runs_forward_and_backward(
    registry: Any, exported: Path, decoder: str, arguments: dict[str, Any], side: int
) -> None:
    factory = load("terratorch", "terratorch.models").EncoderDecoderFactory()
    model = factory.build_model(
        task="segmentation", backbone=NAME, backbone_checkpoint=str(exported), backbone_bands=["B4", "B3", "B2", "B8"],
        backbone_padding="reflect", decoder=decoder, num_classes=3, **arguments,
    )  # fmt: skip
    assert model.patch_size == 8
    logits = model(draw_image(2, 4, side, side)).output
    assert logits.shape == (2, 3, side, side)
    torch.nn.functional.cross_entropy(logits, torch.zeros(2, side, side, dtype=torch.long)).backward()
    for name, parameter in model.encoder.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
    assert model.encoder.encoder.initial_conv[0].weight.grad.norm() > 0
    model.freeze_encoder()
    assert not any(parameter.requires_grad for parameter in model.encoder.parameters())


def test_a_classification_model_of_the_factory_runs(registry: Any, exported: Path) -> None:
    factory = load("terratorch", "terratorch.models").EncoderDecoderFactory()
    model = factory.build_model(
        task="classification", backbone=NAME, backbone_checkpoint=str(exported), backbone_out_indices=[3],
        decoder="IdentityDecoder", num_classes=4,
    )  # fmt: skip
    assert model(draw_image(2, 5, 48, 48)).output.shape == (2, 4)


@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning:lightning.*")
@pytest.mark.filterwarnings("ignore:The '.*_dataloader' does not have many workers:UserWarning:lightning.*")
def test_a_terratorch_task_trains_it_from_raw_values(registry: Any, exported: Path) -> None:
    arguments = {
        "backbone": NAME, "backbone_checkpoint": str(exported), "backbone_bands": BANDS[:3], "backbone_normalise": "l2a",
        "decoder": "UNetDecoder", "decoder_channels": [32, 16, 16, 8], "num_classes": 3,
    }  # fmt: skip
    task = load("terratorch", "terratorch.tasks").SemanticSegmentationTask(
        model_args=arguments, model_factory="EncoderDecoderFactory", loss="ce", ignore_index=255
    )
    raw = draw_image(4, 3, 56, 56).abs() * 1000
    fit(task, lambda place: {"image": raw[place], "mask": raw[place, 0].long() % 3, "filename": str(place)})
    before = registry.build(NAME, checkpoint=exported, bands=BANDS[:3]).encoder.state_dict()
    after = task.model.encoder.encoder.state_dict()
    assert [name for name in before if not torch.equal(before[name], after[name])]
