"""Pickles of GEO-Bench: what published sets hold is read, everything else is refused by name and never runs."""

import copyreg
import datetime
import os
import pickle
import pickletools
import struct
import subprocess
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from affine import Affine
from geobench_fixture import geobench, made
from rasterio.crs import CRS

from mmearth_ray.errors import DataError
from mmearth_ray.evaluate.datasets.restricted import CLASSES, MODULES, REMADE, Record, from_text, loads


class Runs:
    """Pickles as a call."""

    def __init__(self, call: Any, *arguments: Any) -> None:
        self.reduced = (call, arguments)

    def __reduce__(self) -> Any:
        return self.reduced


def text(module: str, name: str) -> bytes:
    """A pickle that is a name alone, in protocol 4."""
    return b"\x80\x04" + b"".join(b"\x8c" + struct.pack("B", len(part)) + part.encode() for part in (module, name)) + b"\x93."


@pytest.mark.parametrize("protocol", [3, 4, 5])
@pytest.mark.parametrize("prefix", ["geobench.", "geobench.io.", "ccb.io."])
def test_what_published_sets_hold_is_read(prefix: str, protocol: int) -> None:
    with geobench(prefix) as classes:
        info = made(classes["Sentinel2"], name="02 - Blue", alt_names=("2", "blue"), wavelength=0.49)
        held = {
            "02 - Blue": {"band_info": info, "date": datetime.date(2019, 11, 5), "transform": Affine(1, 2, 3, 4, 5, 6),
                          "crs": CRS.from_epsg(4326), "meta_info": OrderedDict(a=1)},
            "loss": classes["Accuracy"], "bands_order": ["02 - Blue"], "label": [0, 1],
        }  # fmt: skip
        data = pickle.dumps(held, protocol)
    found = loads(data, "x")
    band = found["02 - Blue"]
    assert isinstance(band["band_info"], Record)
    assert (band["band_info"].kind, band["band_info"].get("none", "name")) == ("Sentinel2", "02 - Blue")
    assert band["date"] == datetime.date(2019, 11, 5)
    assert (band["transform"].kind, band["crs"].kind) == ("Affine", "CRS")
    assert found["loss"].kind == "Accuracy"
    assert (found["label"], band["meta_info"]) == ([0, 1], {"a": 1})
    assert from_text(str(data), "x")["label"] == [0, 1]


@pytest.mark.parametrize("protocol", [3, 4, 5])
@pytest.mark.parametrize(
    "value",
    [np.int64(3), np.float32(1.5), np.bool_(True), np.str_("blue"), np.arange(6).reshape(2, 3), np.arange(6.0).reshape(2, 3).T,
     np.zeros((0, 3), np.int16), np.array(7), np.array(["a", "bc"]), np.arange(3, dtype=">i4")],
)  # fmt: skip
def test_numbers_and_arrays_are_what_they_were(value: Any, protocol: int) -> None:
    found = np.asarray(loads(pickle.dumps(value, protocol), "x"))
    np.testing.assert_array_equal(found, value)
    assert found.dtype.kind == np.asarray(value).dtype.kind
    assert found.shape == np.shape(value)


def test_dates_of_all_kinds_are_what_they_were() -> None:
    zone = datetime.timezone(datetime.timedelta(hours=2))
    held = [datetime.datetime(2020, 1, 2, 3, tzinfo=zone), datetime.time(4), datetime.timedelta(5), datetime.date(2021, 1, 1)]
    assert loads(pickle.dumps(held), "x") == held


MALICIOUS = {
    "posix.system": Runs(os.system, "touch {}"),
    "builtins.eval": Runs(eval, "open('{}', 'w')"),
    "builtins.exec": Runs(exec, "open('{}', 'w')"),
    "builtins.getattr": Runs(getattr, "a", "upper"),
    "builtins.open": Runs(open, "{}", "w"),
    "subprocess.Popen": Runs(subprocess.Popen, ["touch", "{}"]),
    "pathlib.PosixPath": Path("/etc"),
    "mmearth_ray.errors.DataError": Runs(DataError, "x"),
    "numpy.load": Runs(np.load, "{}"),
    "copyreg._reconstructor": Runs(copyreg._reconstructor, object, object, None),  # type: ignore[attr-defined]
    "builtins.object": object,
}


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4, 5])
@pytest.mark.parametrize("name", MALICIOUS)
def test_anything_else_is_refused_by_name_and_does_not_run(name: str, protocol: int, nested: bool, tmp_path: Path) -> None:
    payload = MALICIOUS[name]
    if isinstance(payload, Runs):
        call, arguments = payload.reduced
        fill = lambda value: value.replace("{}", str(tmp_path / "ran")) if isinstance(value, str) else value  # noqa: E731
        arguments = tuple([fill(v) for v in value] if isinstance(value, list) else fill(value) for value in arguments)
        payload = Runs(call, *arguments)
    data = pickle.dumps({"label": 3, "bands_order": [payload]} if nested else payload, protocol)
    with pytest.raises(DataError, match=rf"here\.hdf5 is refused: it pickles \S*{name.rpartition('.')[2]}, and unpickling may"):
        loads(data, "here.hdf5")
    with pytest.raises(DataError, match="is refused"):
        from_text(str(data), "here.hdf5")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("module", "name"),
    [("geobench.dataset", "os"), ("geobench.dataset", "load_sample_hdf5"), ("geobench.dataset", "os.system"),
     ("geobench.dataset", "Sentinel2.__init__"), ("geobench", "dataset.os.system"), ("geobench.evil", "Sentinel2"),
     ("geobench.io.dataset", "Path"), ("numpy", "core.multiarray.scalar"), ("numpy", "ndarray.tofile"), ("numpy", "load"),
     ("datetime", "datetime.now"), ("datetime", "sys"), ("collections", "abc.sys"), ("rasterio.crs", "CRS.from_epsg"),
     ("rasterio", "open"), ("mmearth_ray.evaluate.datasets.restricted", "REMADE"), ("builtins", "__import__"), ("", "eval")],
)  # fmt: skip
def test_names_beside_those_that_are_known_are_refused_even_of_known_modules(module: str, name: str) -> None:
    with pytest.raises(DataError, match=f"it pickles {module}.{name}".replace(".", r"\.")):
        loads(text(module, name), "x")


def test_object_arrays_and_what_numpy_would_unpickle_are_refused() -> None:
    inner = pickle.dumps(Runs(os.system, "true"))
    held = [np.array([Runs(os.system, "true")], dtype=object), np.array([None, 3], dtype=object), np.dtype("O"),
            np.dtype([("a", "i4"), ("b", "O")]), np.zeros(2, [("a", "i4")]), np.ma.MaskedArray([1, 2]),
            np.datetime64("2020-01-01"), Runs(np._core.multiarray.scalar, np.dtype("O"), inner)]  # type: ignore[attr-defined]  # fmt: skip
    for value in held:
        with pytest.raises(DataError, match="is refused"):
            loads(pickle.dumps(value), "x")


def test_no_state_reaches_what_the_unpickler_hands_out() -> None:
    """BUILD with a state of slots sets attributes: of a class that other files are read with, it must not."""
    before = {key: dict(vars(value)) for key, value in REMADE.items()}
    for module, name in [*REMADE, ("geobench.dataset", "Sentinel2"), ("affine", "Affine")]:
        data = text(module, name)[:-1] + pickle.dumps((None, {"__init__": 1, "values": 2, "kind": "x"}), 4)[2:-1] + b"b."
        with pytest.raises(DataError, match="is refused"):
            loads(data, "x")
    assert {key: dict(vars(value)) for key, value in REMADE.items()} == before
    assert loads(text("geobench.dataset", "Sentinel2"), "x").kind == "Sentinel2"


DAMAGED = {
    "empty": b"", "text": b"not a pickle", "cut": pickle.dumps({"a": [1, 2, 3]})[:-4], "persistent": b"\x80\x04U\x01aQ.",
    "extension": b"\x80\x04\x82\x05.", "memo": b"\x80\x04N" + b"r" + struct.pack("<I", 2**31 - 1) + b".",
    "long": b"\x80\x04\x8e" + struct.pack("<Q", 2**40) + b"a.", "deep": b"\x80\x04" + b"(" * 20_000 + b"t" * 20_000 + b".",
    "not callable": b"\x80\x04K\x01)R.", "append": b"\x80\x04K\x01K\x02a.",
}  # fmt: skip


@pytest.mark.parametrize("case", DAMAGED)
def test_damaged_pickles_and_those_that_would_take_all_memory_are_refused_in_one_line(case: str) -> None:
    if case == "deep":  # deep, but only tuples
        assert isinstance(loads(DAMAGED[case], "x"), tuple)
        return
    with pytest.raises(DataError, match="x is refused") as caught:
        loads(DAMAGED[case], "x")
    assert str(caught.value).isprintable()


@pytest.mark.parametrize(
    "value",
    [None, 3, "", "b'", "__import__('os').system('true')", "[1]", "b'a' + b'b'", "'text'", "b'\\x80\\x04N.' ; 1", "(" * 9999,
     "b'" + "(" * 9999, b"b'x", "b'\\q'"],
)  # fmt: skip
def test_an_attribute_that_is_no_text_of_bytes_is_refused(value: Any) -> None:
    with pytest.raises(DataError, match="x is refused"):
        from_text(value, "x")


def test_the_lists_of_names_hold_nothing_that_does_something() -> None:
    assert all(name.isidentifier() and name[0].isupper() for name in CLASSES)
    assert all(module.split(".")[0] in ("geobench", "ccb") for module in MODULES)
    assert len(list(pickletools.genops(text("a", "b")))) == 5
