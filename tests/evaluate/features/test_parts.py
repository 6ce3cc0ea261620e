"""Parts of features on disk: what was written comes back, and what is damaged or another's counts as absent."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from mmearth_ray.errors import DataError
from mmearth_ray.evaluate.features import parts as feature_parts
from mmearth_ray.evaluate.features.parts import Computed, PartKey, part_name, read_part, read_rows, write_part

KEY = PartKey("e" * 64, "t" * 64, "f" * 64, 0, 40, "float32")
IDS = np.array([f"image {i}" for i in range(40)], dtype=object)


def computed_of(*shape: int) -> Computed:
    return Computed(shape, 40, 1.5, "cpu", 1, "a machine", "versions")


def values_of(*shape: int, dtype: str = "float32") -> np.ndarray:
    return np.random.default_rng(0).normal(size=(40, *shape)).astype(dtype)


def test_what_was_written_comes_back(tmp_path: Path) -> None:
    path, values = tmp_path / part_name(3), values_of(7)
    assert path.name == "part-00003.parquet"
    write_part(path, KEY, computed_of(7), IDS, values)
    found = read_part(path, KEY, IDS, whole=True)
    assert found is not None
    assert found[0] == computed_of(7)
    assert found[1] is not None
    assert np.array_equal(found[1], values)
    assert read_part(path, KEY, IDS, whole=False) == (computed_of(7), None)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_maps_of_some_images_are_read_in_the_order_asked_for(tmp_path: Path) -> None:
    key, values = replace(KEY, dtype="float16"), values_of(2, 3, 5, dtype="float16")
    write_part(tmp_path / "p", key, computed_of(2, 3, 5), IDS, values)
    for rows in ([39, 0, 17, 17, 5], [20], []):
        found = read_rows(tmp_path / "p", np.array(rows, np.int64), "float16", (2, 3, 5))
        assert np.array_equal(found, values[rows])
        assert found.dtype == np.float16
    with pytest.raises(DataError, match=r"cannot be read .* remove it and run the command again"):
        read_rows(tmp_path / "q", np.array([1]), "float16", (2, 3, 5))


def test_anothers_part_is_absent(tmp_path: Path) -> None:
    path = tmp_path / "p"
    write_part(path, KEY, computed_of(7), IDS, values_of(7))
    others = [replace(KEY, **change) for change in (
        {"encoder": "x"}, {"task": "x"}, {"feed": "x"}, {"start": 1}, {"stop": 41}, {"dtype": "float16"},
    )]  # fmt: skip
    assert all(read_part(path, key, IDS, whole=True) is None for key in others)
    assert read_part(path, KEY, IDS[::-1], whole=True) is None
    assert read_part(path, KEY, IDS[:-1], whole=False) is None
    assert read_part(tmp_path / "q", KEY, IDS, whole=False) is None


def test_a_part_of_another_form_is_absent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(feature_parts, "FORM", 99)
        write_part(tmp_path / "p", KEY, computed_of(7), IDS, values_of(7))
    assert read_part(tmp_path / "p", KEY, IDS, whole=True) is None
    pq.write_table(pq.read_table(tmp_path / "p").replace_schema_metadata(None), tmp_path / "q")
    assert read_part(tmp_path / "q", KEY, IDS, whole=True) is None


def test_a_damaged_part_is_absent(tmp_path: Path) -> None:
    path = tmp_path / "p"
    write_part(path, KEY, computed_of(7), IDS, values_of(7))
    whole = path.read_bytes()
    place = whole.index(values_of(7)[20].tobytes())
    flipped = bytearray(whole)
    flipped[place] ^= 1
    for damaged in (whole[: len(whole) // 2], whole[:-1], b"", b"PAR1", bytes(flipped)):
        path.write_bytes(damaged)
        assert read_part(path, KEY, IDS, whole=True) is None
    with pytest.raises(DataError, match="remove it"):
        read_rows(path, np.array([20]), "float32", (7,))
    write_part(path, KEY, computed_of(7), IDS, np.where(np.arange(7) == 3, np.nan, values_of(7)))
    assert read_part(path, KEY, IDS, whole=True) is None


def test_a_disk_that_takes_nothing_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(feature_parts.pq, "write_table", full)
    with pytest.raises(DataError, match="no space left on the disk"):
        write_part(tmp_path / "p", KEY, computed_of(7), IDS, values_of(7))
    assert not list(tmp_path.iterdir())
