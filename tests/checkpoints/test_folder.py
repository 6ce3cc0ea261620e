"""The exported model: what is written is read again, wherever it lies, and what is not there is named."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from published_case import make_case

from mmearth_ray.checkpoints.assemble import build_model
from mmearth_ray.checkpoints.folder import Description, open_exported, write_exported
from mmearth_ray.checkpoints.pth import Published
from mmearth_ray.checkpoints.recognise import import_published
from mmearth_ray.errors import DataError


@pytest.fixture(scope="module")
def model() -> tuple[Description, dict[str, torch.Tensor]]:
    return import_published(Published(make_case({}).state, {}, None), {})


def test_what_is_written_is_read_again(model: tuple[Description, dict[str, torch.Tensor]], tmp_path: Path) -> None:
    description, tensors = model
    statistics = {"l1c": {"mean": [1.5] * 12, "std": [None] * 12}}
    description = replace(description, statistics=statistics, step=7, data_set="d")
    exported = open_exported(write_exported(tmp_path / "run" / "exported", description, tensors))
    assert exported.description == description
    assert len({path.stat().st_mode for path in exported.folder.iterdir() if path.is_file()}) == 1  # those of its neighbours
    found = exported.tensors()
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], value) for name, value in tensors.items())
    assert open_exported(tmp_path / "run").encoder_tensors().keys() == {
        name.removeprefix("model.encoder.") for name in tensors if name.startswith("model.encoder.")
    }
    network = build_model(description)
    network.load_state_dict({name.removeprefix("model."): t for name, t in found.items() if name.startswith("model.")})


def test_the_card_tells_bands_normalisation_data_and_recipe(
    model: tuple[Description, dict[str, torch.Tensor]], tmp_path: Path
) -> None:
    description, tensors = model
    numbers = {"mean": [1000.25 + i for i in range(12)], "std": [None, *[7.5] * 11]}
    origin = {"settings": {"model.mask_ratio": 0.6}, "identity": {"data": "0123abc"}}
    description = replace(description, statistics={"l2a": numbers}, data_set="earth", step=300, tiles_seen=9600, origin=origin)
    card = (write_exported(tmp_path / "m", description, tensors) / "README.md").read_text()
    for wanted in ("| 0 | B1 | reflectance x 10000 | 1000.25 | unknown |", "| 7 | B8A | reflectance x 10000 | 1007.25 | 7.5 |",
                   "data set: earth", "steps: 300", "tiles seen: 9600", '"data": "0123abc"', '"model.mask_ratio": 0.6',
                   "patch 8 px", "sentinel2, era5, aster"):  # fmt: skip
        assert wanted in card
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    assert config["origin"] == origin


def test_what_is_no_exported_model_is_named(model: tuple[Description, dict[str, torch.Tensor]], tmp_path: Path) -> None:
    description, tensors = model
    with pytest.raises(DataError, match=r"is no exported model: there is neither encoder.safetensors with config.json"):
        open_exported(tmp_path)
    folder = write_exported(tmp_path / "m", description, tensors)
    config = json.loads((folder / "config.json").read_text())
    for broken, message in [
        ("{", "cannot be read"),
        (json.dumps(config | {"format": 1}), "has format 1, this version reads 2"),
        (json.dumps([1]), "has format None"),
        (json.dumps({k: v for k, v in config.items() if k not in ("bands", "dims")}), "lacks dims, bands"),
    ]:
        (folder / "config.json").write_text(broken)
        with pytest.raises(DataError, match=message):
            open_exported(folder)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "encoder.safetensors").write_bytes(b"half")
    with pytest.raises(DataError, match=r"encoder.safetensors cannot be read"):
        open_exported(folder).encoder_tensors()


def test_a_structure_that_there_is_none_of_is_refused(model: tuple[Description, dict[str, torch.Tensor]]) -> None:
    description, _ = model
    for wrong, message in [
        ({"patch_size": 24}, "a patch must be"),
        ({"stem": "wide"}, "stem must be one of"),
        ({"bands": ["red"]}, "bands of sentinel2 must be"),
        ({"targets": ["moon"]}, "no modality 'moon'"),
    ]:
        with pytest.raises(DataError, match=message):
            build_model(replace(description, **wrong)) if "bands" not in wrong else _input(replace(description, **wrong))


def _input(description: Description) -> object:
    from mmearth_ray.checkpoints.assemble import input_of

    return input_of(description)
