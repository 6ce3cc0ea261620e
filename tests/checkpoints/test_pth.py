"""Published `.pth` files: in and out bit for bit, paths as strings, any other class refused by its name."""

import argparse
import datetime
import os
import pathlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from published_case import STRUCTURES, make_case
from torch import Tensor

from mmearth_ray.checkpoints.folder import open_exported, write_exported
from mmearth_ray.checkpoints.load import load_encoder
from mmearth_ray.checkpoints.pth import Published, export_published, read_pth
from mmearth_ray.checkpoints.recognise import import_published
from mmearth_ray.errors import DataError, UsageError
from mmearth_ray.model.published import to_published


def write_pth(path: Path, state: dict[str, Tensor], **arguments: Any) -> Path:
    """A checkpoint as the published code saves it."""
    content = {
        "model": state,
        "optimizer": {"state": {0: {"step": torch.tensor(3.0)}}, "param_groups": [{"lr": 1e-3, "params": [0]}]},
        "epoch": 199,
        "scaler": {"scale": 65536.0, "_growth_tracker": 0},
        "args": argparse.Namespace(**arguments),
    }
    torch.save(content, path)
    return path


def published_arguments(bands: list[str], targets: dict[str, Any]) -> dict[str, Any]:
    return {
        "data_dir": pathlib.PosixPath("/data/mmearth"), "output_dir": pathlib.PurePosixPath("out"), "input_size": 32,
        "lr": 2.4e-3, "betas": (0.9, 0.95), "resume": None, "distributed": False, "norm_pix_loss": True,
        "inp_modalities": {"sentinel2": bands}, "out_modalities": targets, "modalities": {"sentinel2": bands} | targets,
    }  # fmt: skip


@pytest.mark.parametrize("name", STRUCTURES)
def test_published_to_ours_to_published(name: str, tmp_path: Path) -> None:
    case = make_case(STRUCTURES[name])
    targets = {task: case.bands if task == "sentinel2" else "all" for task in case.meta["modalities"]}
    first = write_pth(tmp_path / "a.pth", case.state, **published_arguments(case.bands, targets))
    description, tensors = import_published(read_pth(first), {})
    assert description.bands == case.bands
    assert description.image_size == 32 or 32 % description.patch_size
    assert description.origin["published"]["args"]["data_dir"] == "/data/mmearth"
    exported = open_exported(write_exported(tmp_path / "model", description, tensors))
    export_published(exported, tmp_path / "b.pth")
    again = torch.load(tmp_path / "b.pth", weights_only=False)
    assert set(again["model"]) == set(case.state)
    assert all(torch.equal(again["model"][key], value) for key, value in case.state.items())
    assert again["epoch"] == 199
    assert again["args"].data_dir == "/data/mmearth"
    twice, twice_tensors = import_published(read_pth(tmp_path / "b.pth"), {})
    assert twice == description
    assert all(torch.equal(twice_tensors[key], value) for key, value in tensors.items())


class Gadget:
    """Runs code when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.marker),)


@pytest.mark.parametrize("place", ["args", "beside", "state"])
def test_code_in_a_pickle_is_refused_by_name_and_never_run(place: str, tmp_path: Path) -> None:
    state, marker = make_case({}).state, tmp_path / "ran"
    content: dict[str, Any] = {"model": state, "args": argparse.Namespace(data_dir=pathlib.PosixPath("/data"))}
    gadget = Gadget(marker)
    if place == "args":
        content["args"].hook = gadget
    elif place == "beside":
        content["hook"] = gadget
    else:
        content["model"] = state | {"hook": gadget}
    torch.save(content, tmp_path / "bad.pth")
    with pytest.raises(DataError, match=r"bad.pth is refused: it pickles (posix|nt).mkdir, and unpickling may run code"):
        read_pth(tmp_path / "bad.pth")
    assert not marker.exists()


def test_harmless_classes_are_refused_as_well(tmp_path: Path) -> None:
    write_pth(tmp_path / "a.pth", make_case({}).state, started=datetime.datetime(2024, 5, 6), inner=Published({}, {}, None))
    with pytest.raises(DataError, match=r"it pickles datetime.datetime, mmearth_ray.checkpoints.pth.Published, and"):
        read_pth(tmp_path / "a.pth")


@pytest.mark.parametrize("how", [{"_use_new_zipfile_serialization": False}, {"pickle_protocol": 4}, {"pickle_protocol": 5}])
def test_a_class_is_named_in_every_form_of_file(how: dict[str, Any], tmp_path: Path) -> None:
    content = {"model": make_case({}).state, "args": argparse.Namespace(hook=Gadget(tmp_path / "ran"), data=pathlib.Path("/d"))}
    torch.save(content, tmp_path / "bad.pth", **how)
    with pytest.raises(
        DataError, match=r"bad.pth is refused: it pickles (posix|nt).mkdir, and unpickling may run code"
    ) as caught:
        read_pth(tmp_path / "bad.pth")
    assert "weights_only" not in str(caught.value)
    assert not (tmp_path / "ran").exists()


def test_what_others_allowed_stays_allowed_and_is_not_read_here(tmp_path: Path) -> None:
    write_pth(tmp_path / "a.pth", make_case({}).state, started=datetime.date(2024, 5, 6))
    before = torch.serialization.get_safe_globals()
    torch.serialization.add_safe_globals([argparse.Namespace, datetime.date])
    try:
        with pytest.raises(DataError, match=r"it pickles datetime.date, and"):
            read_pth(tmp_path / "a.pth")
        assert {argparse.Namespace, datetime.date} <= set(torch.serialization.get_safe_globals())
    finally:
        torch.serialization.clear_safe_globals()
        torch.serialization.add_safe_globals(before)


def test_an_exported_file_says_itself_what_it_is(tmp_path: Path) -> None:
    state = make_case({"bands": ["B2", "B3", "B4"]}).state
    description, tensors = import_published(Published(state, {}, None), {"sentinel2": ["B4", "B3", "B2"]})
    statistics = {"l2a": {"mean": [1.0] * 3, "std": [2.0] * 3}}
    description = replace(description, grn="image", statistics=statistics, step=9, normalise_targets=["aster"])
    export_published(open_exported(write_exported(tmp_path / "m", description, tensors)), tmp_path / "a.pth")
    assert import_published(read_pth(tmp_path / "a.pth"), {})[0] == description
    with pytest.raises(UsageError, match=r"bands.sentinel2: the checkpoint was exported with \['B4', 'B3', 'B2'\]"):
        import_published(read_pth(tmp_path / "a.pth"), {"sentinel2": ["B2", "B3", "B4"]})


def test_a_full_disk_is_told_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    description, tensors = import_published(Published(make_case({}).state, {}, None), {})
    exported = open_exported(write_exported(tmp_path / "m", description, tensors))

    def full(*_: object) -> None:
        raise RuntimeError("PytorchStreamWriter failed writing file: No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(DataError, match="no space left on the disk"):
        export_published(exported, tmp_path / "a.pth")
    assert [p.name for p in tmp_path.iterdir()] == ["m"]


def test_arguments_of_any_form_are_read(tmp_path: Path) -> None:
    state = {f"module.{name}": value for name, value in make_case({}).state.items()}
    nested = argparse.Namespace(inner=argparse.Namespace(path=pathlib.PurePosixPath("/a")), pair=(1, 2.5), odd=float("nan"))
    torch.save({"model": state, "args": nested}, tmp_path / "a.pth")
    published = read_pth(tmp_path / "a.pth")
    assert published.arguments == {"inner": {"path": "/a"}, "pair": [1, 2.5], "odd": "nan"}
    assert import_published(published, {})[0].targets == ["sentinel2", "era5", "aster"]
    for odd in ("text", [1], {"modalities": {"sentinel2": [["B1"]]}}):
        torch.save({"model": state, "args": odd}, tmp_path / "b.pth")
        assert import_published(read_pth(tmp_path / "b.pth"), {})[0].bands[0] == "B1"
    with pytest.raises(UsageError, match=r"bands.typo: the checkpoint has no typo"):
        import_published(published, {"typo": ["B1"]})


def test_files_that_are_no_checkpoints_are_named(tmp_path: Path) -> None:
    whole = write_pth(tmp_path / "whole.pth", make_case({}).state).read_bytes()
    (tmp_path / "text.pth").write_text("hello")
    (tmp_path / "empty.pth").write_bytes(b"")
    (tmp_path / "half.pth").write_bytes(whole[: len(whole) // 2])
    torch.save([1, 2], tmp_path / "list.pth")
    torch.save({"model": {"a": 1}}, tmp_path / "numbers.pth")
    torch.save({"state_dict": {}}, tmp_path / "other.pth")
    for name in ("none", "text", "empty", "half", "list", "numbers", "other"):
        with pytest.raises(DataError, match=rf"{name}.pth (is refused|cannot be read|holds no state dict)"):
            read_pth(tmp_path / f"{name}.pth")


def test_bands_come_from_the_user_the_arguments_or_their_number() -> None:
    colour = make_case({"bands": ["B2", "B3", "B4"]}).state
    assert import_published(Published(colour, {}, None), {})[0].bands == ["B2", "B3", "B4"]
    assert import_published(Published(colour, {}, None), {"sentinel2": ["B4", "B3", "B2"]})[0].bands == ["B4", "B3", "B2"]
    named = {"modalities": {"sentinel2": ["B8", "B11", "B12"]}}
    assert import_published(Published(colour, named, None), {})[0].bands == ["B8", "B11", "B12"]
    two = make_case({"bands": ["B8", "B4"]}).state
    with pytest.raises(UsageError, match=r"has 2 bands of sentinel2 and does not say which; name them: bands.sentinel2="):
        import_published(Published(two, {}, None), {})
    with pytest.raises(UsageError, match=r"bands.sentinel2 names 3 bands, the checkpoint has 2"):
        import_published(Published(two, {}, None), {"sentinel2": ["B4", "B3", "B2"]})
    with pytest.raises(UsageError, match="bands of sentinel2 must be distinct and among"):
        import_published(Published(two, {}, None), {"sentinel2": ["B4", "red"]})


def test_of_a_model_with_tasks_of_its_own_only_the_encoder_comes(tmp_path: Path) -> None:
    state = {k.replace("sentinel2", "IMNET"): v for k, v in make_case(STRUCTURES["its input alone, in colour"]).state.items()}
    with pytest.raises(UsageError, match=r"predicts IMNET, .* what its 3 channels stand for: bands.sentinel2=\[...\]"):
        import_published(Published(state, {"modalities": {"sentinel2": ["B2", "B3", "B4"]}}, None), {})
    description, tensors = import_published(Published(state, {}, None), {"sentinel2": ["B4", "B3", "B2"]})
    assert description.bands == ["B4", "B3", "B2"]
    assert description.targets == []
    assert all(name.startswith("model.encoder.") for name in tensors)
    exported = open_exported(write_exported(tmp_path / "m", description, tensors))
    back = to_published(exported.tensors(), ())
    assert all(torch.equal(back[key], value) for key, value in state.items() if key.startswith("encoder."))
    assert load_encoder(tmp_path / "m")(torch.zeros(1, 3, 64, 64)).shape == (1, 24)
    with pytest.raises(DataError, match="holds the encoder only"):
        export_published(exported, tmp_path / "a.pth")


def test_tasks_follow_the_arguments_or_the_table_where_the_state_dict_was_sorted() -> None:
    case = make_case(STRUCTURES["a choice of tasks in an order of its own"])
    state = dict(sorted(case.state.items()))
    arguments = {"out_modalities": dict.fromkeys(case.meta["modalities"], "all")}
    assert import_published(Published(state, arguments, None), {})[0].targets == case.meta["modalities"]
    assert import_published(Published(state, {}, None), {})[0].targets == ["sentinel2", "lat", "biome", "esa_worldcover"]


def test_export_needs_the_decoder(tmp_path: Path) -> None:
    description, tensors = import_published(Published(make_case({}).state, {}, None), {})
    encoder = {name: t for name, t in tensors.items() if name.startswith("model.encoder.")}
    folder = write_exported(tmp_path / "model", description, encoder)
    with pytest.raises(DataError, match="holds the encoder only"):
        export_published(open_exported(folder), tmp_path / "a.pth")
    assert not list(tmp_path.glob("*.pth"))
