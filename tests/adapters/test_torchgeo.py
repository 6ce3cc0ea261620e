"""TorchGeo: the weights entry, its transforms and the builder, beside TorchGeo's own."""

import pickle
import sys
from copy import deepcopy
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from interop import BANDS, STATISTICS, draw_image, export, fit, load

from mmearth_ray import load_encoder
from mmearth_ray.errors import DataError, UsageError
from mmearth_ray.modalities import PRODUCTS, Kind, Level, Modality
from mmearth_ray.objective import Normaliser

TOLERANCE = 1e-6
ROUNDING = 1e-12  # of float64


@pytest.fixture(scope="module")
def adapter() -> Any:
    return load("torchgeo", "mmearth_ray.adapters.torchgeo")


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export(tmp_path_factory.mktemp("run") / "exported")


def test_without_torchgeo_the_import_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchvision.models._api", None)
    monkeypatch.delitem(sys.modules, "mmearth_ray.adapters.torchgeo", raising=False)
    with pytest.raises(UsageError, match=r"torchvision is not installed; run: pip install 'mmearth-ray\[torchgeo\]'"):
        import_module("mmearth_ray.adapters.torchgeo")


def test_the_entry_is_one_of_torchgeos_kind_and_says_what_goes_in(adapter: Any, exported: Path) -> None:
    entry = adapter.encoder_weights(exported)
    models = load("torchgeo", "torchgeo.models")
    theirs = models.ResNet50_Weights.SENTINEL2_ALL_MOCO
    assert type(entry).mro()[2] is type(theirs).mro()[1], "both are torchvision's WeightsEnum"
    assert set(theirs.meta) <= set(entry.meta)
    assert (entry.meta["bands"], entry.meta["in_chans"]) == (BANDS, len(BANDS))
    assert (entry.meta["model"], entry.meta["ssl_method"]) == ("convnextv2_atto", "mpmae")
    assert (entry.meta["dataset"], entry.meta["product"], entry.meta["patch_size"]) == ("made up", "l2a", 8)
    assert entry.meta["publication"].startswith("https://arxiv.org/")
    assert entry.url == str(exported)
    assert str(entry) == "MMEarthRay_Weights.OPTICAL_ATTO_L2A"


def test_the_entry_can_be_copied_and_sent_to_another_process(adapter: Any, exported: Path) -> None:
    entry = adapter.encoder_weights(exported, product="l1c", bands=["B4", "B2"])
    assert deepcopy(entry) is entry
    received = pickle.loads(pickle.dumps(entry))
    assert (str(received), received.url, received.meta) == (str(entry), entry.url, entry.meta)


@pytest.mark.parametrize("num_classes", [0, 3])
def test_the_model_is_the_one_that_load_encoder_gives(adapter: Any, exported: Path, num_classes: int) -> None:
    model = adapter.mmearth_ray_encoder(weights=adapter.encoder_weights(exported), num_classes=num_classes, in_chans=5)
    image = draw_image(2, 5, 24, 32)
    expected = load_encoder(exported).forward_features(image)
    assert expected.shape == (2, 320, 3, 4)
    torch.testing.assert_close(model.forward_features(image), expected, rtol=0, atol=TOLERANCE)
    assert model(image).shape == (2, num_classes or 320)


def test_maps_of_stages_come_out_with_features_only(adapter: Any, exported: Path) -> None:
    model = adapter.mmearth_ray_encoder(adapter.encoder_weights(exported), features_only=True, out_indices=(1, 3))
    image = draw_image(1, 5, 24, 24)
    expected = load_encoder(exported, features_only=True, out_indices=(1, 3))(image)
    assert model.feature_info.channels() == [m.shape[1] for m in model(image)] == [80, 320]
    torch.testing.assert_close(model(image), expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("stem", ["modified", "original"])
def test_some_bands_in_another_order_compute_what_all_do_where_the_others_are_0(
    adapter: Any, tmp_path: Path, stem: str
) -> None:
    path, bands = export(tmp_path / "exported", stem=stem), ["B8", "B2", "B4"]
    entry = adapter.encoder_weights(path, bands=bands)
    model = adapter.mmearth_ray_encoder(entry).double()
    image, whole = draw_image(2, 3, 16, 24).double(), torch.zeros(2, 5, 16, 24).double()
    whole[:, [BANDS.index(band) for band in bands]] = image
    expected = load_encoder(path).double().forward_features(whole)
    torch.testing.assert_close(model.forward_features(image), expected, rtol=0, atol=ROUNDING)
    assert (model.bands, model.in_chans, entry.meta["in_chans"]) == (tuple(bands), 3, 3)


def test_some_bands_are_normalised_with_their_own_statistics(adapter: Any, exported: Path) -> None:
    entry = adapter.encoder_weights(exported, bands=["B8", "B2"], product="l1c")
    raw = draw_image(2, 8, 8).abs() * 1000
    expected = torch.stack([(raw[0] - 2100) / 500, (raw[1] - 900) / 100])
    torch.testing.assert_close(entry.transforms(raw), expected)
    torch.testing.assert_close(adapter.mmearth_ray_encoder(entry).normalise("l1c")(raw), expected)


def test_the_state_dict_of_an_entry_fits_its_model(adapter: Any, exported: Path) -> None:
    entry = adapter.encoder_weights(exported, bands=BANDS[:3])
    state = entry.get_state_dict(progress=True)
    adapter.mmearth_ray_encoder(entry).load_state_dict(state, strict=True)
    assert state["initial_conv.0.weight"].shape == (40, 3, 3, 3)


def test_the_transforms_are_plain_arithmetic_with_0_for_what_is_missing(adapter: Any, exported: Path) -> None:
    transforms = adapter.encoder_weights(exported, product="l1c").transforms
    raw = draw_image(5, 8, 8).abs() * 1000
    raw[0, 0, 0], raw[1, 2, 3], raw[2, 5, 5] = 0, float("nan"), float("-inf")
    expected = raw.clone()
    for place, (mean, std) in enumerate(zip(STATISTICS["l1c"]["mean"], STATISTICS["l1c"]["std"], strict=True)):
        assert mean is not None
        assert std is not None
        expected[place] = (raw[place] - mean) / std
    expected[0, 0, 0] = expected[1, 2, 3] = expected[2, 5, 5] = 0
    before = raw.clone()
    torch.testing.assert_close(transforms(raw), expected)
    torch.testing.assert_close(raw, before, equal_nan=True)
    torch.testing.assert_close(transforms(raw.expand(2, 5, 8, 8)), expected.expand(2, 5, 8, 8))


@pytest.mark.parametrize("product", PRODUCTS)
def test_the_transforms_normalise_as_pretraining_does(adapter: Any, exported: Path, product: str) -> None:
    optical = Modality(
        name="optical", level=Level.PIXEL, kind=Kind.CONTINUOUS, bands=tuple(BANDS), dtype="uint16", missing=(0,),
        by_product=True, source="invented",
    )  # fmt: skip
    mean, std = (np.array([STATISTICS[p][part] for p in PRODUCTS], np.float32) for part in ("mean", "std"))
    raw = draw_image(2, 5, 16, 16).abs().mul(1000).to(torch.int32)
    batch = {
        "optical": raw,
        "optical.present": torch.tensor([True, True]),
        "product": torch.full((2,), PRODUCTS.index(product)),
    }
    expected = Normaliser(optical, mean, std)(batch).truth
    actual = adapter.encoder_weights(exported, product=product).transforms(raw)
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


def test_the_transforms_take_samples_as_torchgeos_data_sets_give_them(adapter: Any, exported: Path) -> None:
    transforms = adapter.encoder_weights(exported).transforms
    sample = {"image": draw_image(5, 8, 8), "mask": torch.ones(8, 8, dtype=torch.long), "crs": "EPSG:32632"}
    out = transforms(sample)
    assert out is not sample
    torch.testing.assert_close(out["image"], transforms(sample["image"]))
    assert (out["mask"] is sample["mask"], out["crs"]) == (True, "EPSG:32632")


@pytest.mark.parametrize(
    ("known", "product"), [({"l1c": "l1c", "l2a": "l2a"}, "l2a"), ({"l1c": "l1c", "l2a": None}, "l1c"), ({"l1c": "l1c"}, "l1c")]
)
def test_the_product_is_surface_reflectance_where_it_has_statistics(
    adapter: Any, tmp_path: Path, known: dict[str, str | None], product: str
) -> None:
    nothing = {"mean": [None] * 5, "std": [None] * 5}
    statistics = {name: STATISTICS[of] if of else nothing for name, of in known.items()}
    path = export(tmp_path / "exported", statistics=statistics)
    assert adapter.encoder_weights(path).meta["product"] == product


def test_weights_without_statistics_load_and_refuse_to_normalise(adapter: Any, tmp_path: Path) -> None:
    entry = adapter.encoder_weights(export(tmp_path / "exported", statistics=None, size=None, data_set=None))
    assert (str(entry), entry.meta["product"]) == ("MMEarthRay_Weights.OPTICAL_CUSTOM", None)
    assert adapter.mmearth_ray_encoder(entry)(draw_image(1, 5, 8, 8)).shape == (1, 320)
    with pytest.raises(UsageError, match="without statistics of its bands; normalise with those of your data"):
        entry.transforms(draw_image(5, 8, 8))


def test_what_does_not_fit_is_refused_by_name(adapter: Any, exported: Path, tmp_path: Path) -> None:
    entry = adapter.encoder_weights(exported)
    with pytest.raises(UsageError, match="in_chans=13: these weights take 5 bands: B2, B3, B4, B8A, B8"):
        adapter.mmearth_ray_encoder(entry, in_chans=13)
    with pytest.raises(ValueError, match=r"\(\.\.\., 5, height, width\); got \(3, 8, 8\)"):
        entry.transforms(draw_image(3, 8, 8))
    with pytest.raises(UsageError, match="no band B8a, R; it has B2, B3, B4, B8A, B8"):
        adapter.encoder_weights(exported, bands=["B2", "B8a", "R"])
    with pytest.raises(UsageError, match="distinct names of B2, B3, B4, B8A, B8; got B2, B2"):
        adapter.encoder_weights(exported, bands=["B2", "B2"])
    with pytest.raises(UsageError, match="'l3'; name one of l1c, l2a"):
        adapter.encoder_weights(exported, product="l3")
    with pytest.raises(UsageError, match=r"encoder_weights\(path\); got None"):
        adapter.mmearth_ray_encoder(None)
    with pytest.raises(DataError, match="no exported model"):
        adapter.encoder_weights(tmp_path)


@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning:lightning.*")
@pytest.mark.filterwarnings("ignore:The '.*_dataloader' does not have many workers:UserWarning:lightning.*")
def test_a_torchgeo_trainer_trains_it(adapter: Any, exported: Path) -> None:
    class Task(load("torchgeo", "torchgeo.trainers").ClassificationTask):
        def configure_models(self) -> None:
            self.model = adapter.mmearth_ray_encoder(self.weights, num_classes=self.hparams["num_classes"])

    entry = adapter.encoder_weights(exported)
    task = Task(weights=entry, in_channels=5, num_classes=3)
    raw = draw_image(4, 5, 16, 16).abs() * 1000
    fit(task, lambda place: entry.transforms({"image": raw[place], "label": torch.tensor(place % 3)}))
    before = load_encoder(exported).state_dict()
    moved = [name for name, value in task.model.state_dict().items() if name in before and not torch.equal(value, before[name])]
    assert "initial_conv.0.weight" in moved
