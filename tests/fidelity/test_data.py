"""From a release to a gradient: what defects of the published loader did to the data does not happen here."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from release_fixture import edit_hdf5, is_shifted
from tiny_release import (
    MIXED,
    PLACELESS,
    SIDE,
    UNMAPPED,
    WOODED,
    at_hidden,
    convert_release,
    gradient_of,
    open_tiny,
    row_group,
    samples,
    step,
)

from mmearth_ray.modalities import TABLE, Kind, Level, Modality, get, tasks
from mmearth_ray.shards.convert import DISPLACED
from mmearth_ray.shards.manifest import Manifest
from mmearth_ray.shards.read import filler
from mmearth_ray.stream.prepare import valid_mask
from mmearth_ray.train.loop import to_device
from mmearth_ray.train.outputs import description_of

SHIFTED = next(row for row in range(18) if is_shifted(row))
COVER, CANOPY = "esa_worldcover", "canopy_height_eth"


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    return convert_release(tmp_path_factory.mktemp("fidelity"))


def test_tree_cover_is_class_zero_and_has_gradient(manifest: Manifest) -> None:
    experiment, objective = open_tiny(manifest)
    batch = samples(experiment, [WOODED])
    assert (batch[COVER] == 0).all()
    found = step(objective, batch)
    hidden = batch["hidden"].shape[1] * 8 * 8
    assert found.counts[COVER] == hidden
    gradient = gradient_of(found.predictions[COVER]).flatten(0, 2)
    assert gradient.shape == (hidden, 11)
    assert (gradient[:, 0] < 0).all()  # more of tree cover lowers the loss, everywhere
    assert (gradient[:, 1:] > 0).all()


def test_a_gap_in_worldcover_is_not_tree_cover(manifest: Manifest) -> None:
    experiment, objective = open_tiny(manifest)
    batch = samples(experiment, [UNMAPPED, WOODED, MIXED])
    assert (batch[COVER][0] == -1).all()
    assert (batch[COVER][2, 2] == -1).all(), "a code that is no class"
    counts = dict(zip([m.name for m in experiment.spec.targets], batch["count"].T.tolist(), strict=True))
    assert counts[COVER][0] == 0 < counts[COVER][2] < counts[COVER][1]
    gradient = gradient_of(step(objective, batch).predictions[COVER])
    assert (gradient[0] == 0).all()
    assert (gradient[1] != 0).all()


def test_missing_is_decided_on_raw_values_whatever_statistics_make_of_them(manifest: Manifest, tmp_path: Path) -> None:
    """Canopy of 20 m normalises to 127, the raw filler; reflectance 500 to 0, the raw filler of Sentinel-2."""
    statistics = json.loads(json.dumps(manifest.statistics))
    statistics[CANOPY]["all"]["height"] |= {"mean": -107.0, "std": 1.0}
    for product in ("l1c", "l2a"):
        statistics["sentinel2"][product]["B2"] |= {"mean": 500.0, "std": 2.0}
    path = tmp_path / "statistics.json"
    path.write_text(json.dumps(statistics), encoding="utf-8")
    experiment, objective = open_tiny(manifest, f"data.statistics={path}")
    group = row_group(experiment)
    for column, value, missing in ((f"{CANOPY}.height", 20, 127), ("sentinel2.B2", 500, 0)):
        group.columns[column][:] = value
        group.columns[column][:, :, 3] = missing
    batch = samples(experiment, [4, 5], group)
    read = objective.read(to_device(batch, torch.device("cpu")))
    for name, band, normalised in ((CANOPY, 0, 127.0), ("sentinel2", 1, 0.0)):
        expected = torch.ones(2, SIDE, SIDE, dtype=torch.bool)
        expected[..., 3] = False
        assert torch.equal(read[name].valid[:, band], expected), name
        assert np.array_equal(valid_mask(experiment.spec, get(name), batch)[:, band], expected.numpy()), name
        assert (read[name].truth[:, band][expected] == normalised).all(), name
        assert (read[name].truth[:, band][~expected] == 0).all(), name


@pytest.mark.parametrize(("name", "missing"), [(CANOPY, (127, -128)), ("aster", (-32768,))])
def test_fillers_as_integers_store_them_are_missing(name: str, missing: tuple[int, ...], manifest: Manifest) -> None:
    experiment, objective = open_tiny(manifest)
    batch = samples(experiment, [MIXED, 4])
    assert {value for value in missing if (batch[name] == value).any()} == set(missing)
    data = ~np.isin(batch[name], missing)
    assert np.array_equal(valid_mask(experiment.spec, get(name), batch), data)
    found = step(objective, batch)
    hidden_data = at_hidden(data, batch["hidden"])
    assert found.counts[name] == int(hidden_data.sum()) < hidden_data.numel()
    assert torch.equal(gradient_of(found.predictions[name]) != 0, hidden_data)
    for band in manifest.statistics[name]["all"].values():
        assert -50 <= band["min"] <= band["max"] <= 4000, "fillers are no part of the statistics"


@pytest.mark.parametrize("m", TABLE, ids=[m.name for m in TABLE])
def test_the_filler_of_a_layer_that_a_release_lacks_fits_its_type_and_is_missing(m: Modality) -> None:
    layer = filler(m, 2, 4)
    assert layer.dtype == np.dtype(m.dtype)
    if m.kind is Kind.CATEGORICAL:
        assert ((layer if m.level is Level.IMAGE else m.label_table()[layer]) == -1).all()
    else:
        assert not m.valid(layer).any()


def test_layers_that_the_export_displaced_train_nothing(manifest: Manifest, tmp_path: Path) -> None:
    def garble(file: object) -> None:
        for name in DISPLACED:
            layer = file[name]  # type: ignore[index]
            layer[SHIFTED] = np.flip(layer[SHIFTED], axis=-1)

    results = []
    for data in (manifest, convert_release(tmp_path, edit_hdf5(garble))):
        experiment, objective = open_tiny(data)
        batch = samples(experiment, [SHIFTED, 4])
        names = [m.name for m in experiment.spec.targets]
        counts = dict(zip(names, batch["count"].tolist()[0], strict=True))
        assert {name for name, count in counts.items() if count == 0} == set(DISPLACED)
        found = step(objective, batch)
        for name in DISPLACED:
            gradient = gradient_of(found.predictions[name])
            assert (gradient[0] == 0).all(), name
            assert (gradient[1] != 0).any(), name
        results.append((batch, found))
    (one, first), (other, second) = results
    assert not np.array_equal(one["sentinel1"][0], other["sentinel1"][0])
    assert torch.equal(first.loss, second.loss)
    assert all(torch.equal(gradient, second.gradients[name]) for name, gradient in first.gradients.items())


def test_a_tile_without_biome_and_ecoregion_is_not_of_class_zero(manifest: Manifest) -> None:
    experiment, objective = open_tiny(manifest)
    batch = samples(experiment, [PLACELESS, WOODED])
    found = step(objective, batch)
    assert batch["biome"].tolist() == [-1, 0]
    for name in ("biome", "eco_region"):
        gradient = gradient_of(found.predictions[name])
        assert found.counts[name] == 1
        assert (gradient[0] == 0).all()
        assert (gradient[1] != 0).all()


def test_values_travel_in_the_types_of_the_release(manifest: Manifest) -> None:
    experiment, _ = open_tiny(manifest)
    batch = next(experiment.source.batches([(0, 5)]))
    tensors = to_device(batch, torch.device("cpu"))
    for m in tasks():
        stored = {Level.PIXEL: "int8", Level.IMAGE: "int16"}[m.level] if m.kind is Kind.CATEGORICAL else m.dtype
        assert batch[m.name].dtype == np.dtype(stored), m.name
        assert str(tensors[m.name].dtype) == f"torch.{stored}", m.name
    maps = sum(batch[m.name].nbytes for m in tasks() if m.level is Level.PIXEL)
    assert maps == 5 * SIDE * SIDE * 64  # as float32 and int64 it is 112 bytes a pixel
    assert len(set(batch["id"].tolist())) == 5


def test_bands_come_in_the_order_asked_for_and_the_export_names_it(manifest: Manifest) -> None:
    order = ["B4", "B3", "B2"]
    experiment, objective = open_tiny(manifest, f"model.bands.sentinel2=[{','.join(order)}]")
    batch, group = samples(experiment, [4, 5]), row_group(experiment)
    rows = [group.id.index("4"), group.id.index("5")]
    seen: list[torch.Tensor] = []
    objective.model.encoder.register_forward_pre_hook(lambda module, arguments: seen.append(arguments[0]))
    step(objective, batch)
    description = description_of(experiment, 0)
    assert description.bands == description.target_bands["sentinel2"] == order
    assert description.statistics is not None
    for channel, band in enumerate(order):
        raw = group.columns[f"sentinel2.{band}"][rows]
        for image, product in enumerate(("l2a", "l1c")):
            moments = manifest.statistics["sentinel2"][product][band]
            assert description.statistics[product]["mean"][channel] == pytest.approx(moments["mean"])
            expected = np.where(raw[image] == 0, 0, (raw[image] - moments["mean"]) / moments["std"])
            assert np.allclose(seen[0][image, channel], expected, atol=1e-4), (band, product)
