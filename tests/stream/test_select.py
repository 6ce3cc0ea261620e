"""Selection: expressions mean what they mean in Python, nulls compare as false, errors name what they do not understand."""

from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tiny_earth import make_block, make_data_set

from mmearth_ray.errors import DataError, UsageError
from mmearth_ray.shards.manifest import Manifest
from mmearth_ray.shards.write import write_shard
from mmearth_ray.stream.metadata import Metadata
from mmearth_ray.stream.select import select

TILES, NULLS = 30, (4, 9, 17)  # these tiles have neither date nor place


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    """Two shards with row groups of 5, 5 and 4, and 5, 5 and 6 tiles."""
    path = tmp_path_factory.mktemp("shards")
    records = []
    for index, edges in enumerate([(0, 5, 10, 14), (14, 19, 24, 30)]):
        blocks = [make_block(range(a, b), 8, 26) for a, b in pairwise(edges)]
        for place, block in enumerate(blocks):
            gone = [int(i) in NULLS for i in block.id]
            blocks[place] = replace(
                block,
                date=[None if no else day for no, day in zip(gone, block.date, strict=True)],
                latitude=np.where(gone, np.nan, block.latitude), longitude=np.where(gone, np.nan, block.longitude),
            )  # fmt: skip
        records.append(write_shard(path / f"part-{index}.parquet", blocks, 8))
    return Manifest(path, "tiny", 8, tuple(records), {})


def rows(manifest: Manifest) -> list[dict[str, Any]]:
    """Metadata of every tile in stored order, dates as text, which sorts as dates do."""
    found = []
    for shard in manifest.shards:
        table = pq.read_table(manifest.directory / shard.file, columns=["id", "split", "product", "date", "latitude",
                                                                        "longitude", "source"])  # fmt: skip
        found += table.to_pylist()
    return [row | {"date": row["date"] and row["date"].isoformat()} for row in found]


def chosen(manifest: Manifest, where: str) -> list[int]:
    """Numbers of the selected tiles in stored order, from shard, row group and row."""
    selection = select(Metadata(manifest), where)
    assert selection.sizes.sum() == len(selection.rows)
    starts, at = {}, 0
    for index, shard in enumerate(manifest.shards):
        for group, size in enumerate(shard.row_groups):
            starts[index, group] = at
            at += size
    found = []
    for index in range(len(selection.group)):
        start = starts[int(selection.shard[index]), int(selection.group[index])]
        found += [start + row for row in selection.rows_of(index).tolist()]
        assert len(selection.rows_of(index)) == selection.sizes[index] > 0
    return found


@pytest.mark.parametrize(
    "where",
    [
        "split == 'train'",
        "split != 'train'",
        "product == 'l2a' and split == 'val'",
        "-3.5 < longitude <= -0.5",
        "latitude >= 3.5",
        "latitude < 5 or latitude > 11",
        "3.5 <= latitude",
        "10 > latitude != 2",
        "date >= '2018-05-01'",
        "'2018-02-01' <= date < '2018-06-01'",
        "date == '2018-01-10'",
        "date != '2018-01-10'",
        "date in ['2018-01-10', '2018-01-19']",
        "date not in ['2018-01-10', '2018-01-19']",
        "latitude in (1.5, 2)",
        "latitude not in (1.5, 2)",
        "id in ['12', '3', '4']",
        "id not in {'12', '3'}",
        "id > '20'",
        "'20' > id",
        "source == 'odd' and not (id == '1' or id == '3')",
        "not split == 'val'",
        "id in file('LIST')",
        "id not in file('LIST') and source == 'even'",
        "True",
        "False",
        "True and id == '5'",
    ],
)
def test_an_expression_selects_what_python_would_with_unknown_values_false(
    where: str, manifest: Manifest, tmp_path: Path
) -> None:
    listed = tmp_path / "ids.txt"
    listed.write_text("3\n\n 14\r\n27", encoding="utf-8")
    where = where.replace("LIST", str(listed))
    expected = []
    for row in rows(manifest):
        known = all(row[name] is not None for name in row if name in where)
        if known and eval(where, {"file": lambda _: ["3", "14", "27"]}, row):
            expected.append(int(row["id"]))
    assert chosen(manifest, where) == expected
    assert expected or where == "False"


def test_an_empty_expression_and_surrounding_spaces_are_fine(manifest: Manifest) -> None:
    assert chosen(manifest, "") == chosen(manifest, "  ") == list(range(TILES))
    assert chosen(manifest, "  id == '7'\n") == [7]


def test_a_number_may_stand_for_an_id(manifest: Manifest) -> None:
    assert chosen(manifest, "id in [3, 12]") == [3, 12]


def test_row_groups_without_a_chosen_row_are_left_out(manifest: Manifest) -> None:
    selection = select(Metadata(manifest), "id in ['2', '4', '13', '29']")
    assert selection.shard.tolist() == [0, 0, 1]
    assert selection.group.tolist() == [0, 2, 2]
    assert [selection.rows_of(i).tolist() for i in range(3)] == [[2, 4], [3], [5]]
    assert selection.sizes.tolist() == [2, 1, 1]


def test_nothing_selected_is_an_empty_selection(manifest: Manifest) -> None:
    selection = select(Metadata(manifest), "id == 'none'")
    assert len(selection.rows) == len(selection.sizes) == 0


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("split = 'train'", "data.where: cannot read \"split = 'train'\" ("),
        ("split == 'train", 'data.where: cannot read "split == \'train" ('),
        (
            "  spilt == 'train'",
            "data.where: 'spilt' is no column; compare id, split, product, date, latitude, longitude, source",
        ),
        ("split", "data.where: 'split' is no condition"),
        ("1", "data.where: '1' is no condition"),
        ("len(id) == 2", "data.where: 'len(id)' is no column"),
        ("'a' == 'a'", "data.where: ''a'' is no column"),
        ("latitude < longitude", "data.where: 'longitude' is no value"),
        ("id in {[1]}", "data.where: '{[1]}' is no value"),
        ("id in 5", "data.where: '5' is no list"),
        ("id in '12'", "data.where: ''12'' is no list"),
        ("'12' in id", "data.where: ''12'' is no column"),
        ("id is None", "data.where: 'id' is compared in a way that is not understood"),
        ("latitude > 'north'", "data.where: ''north'' cannot be compared with latitude"),
        ("latitude == None", "data.where: 'None' cannot be compared with latitude"),
        ("date > '2018-13-01'", "data.where: ''2018-13-01'' cannot be compared with date"),
        ("date > 2018", "data.where: '2018' cannot be compared with date"),
        ("id in file('/nowhere/ids.txt')", "data.where: cannot read the list /nowhere/ids.txt: "),
    ],
)
def test_what_is_not_understood_is_named(where: str, message: str, manifest: Manifest) -> None:
    with pytest.raises(UsageError) as caught:
        select(Metadata(manifest), where)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("where", ["split = 'train'", "spilt == 'train'", "id in file('/nowhere/ids.txt')"])
def test_errors_name_the_setting_that_holds_the_expression(where: str, manifest: Manifest) -> None:
    with pytest.raises(UsageError, match=r"^data\.validate_where: "):
        select(Metadata(manifest), where, key="data.validate_where")


def test_a_missing_shard_is_named_with_the_remedy(tmp_path: Path) -> None:
    manifest = make_data_set(tmp_path, tiles=8, size=8)
    shard = tmp_path / manifest.shards[0].file
    shard.unlink()
    with pytest.raises(DataError, match=f"the shard {shard} is missing; restore it, or build the data set again"):
        select(Metadata(manifest), "")


def test_a_damaged_shard_is_named(tmp_path: Path) -> None:
    manifest = make_data_set(tmp_path, tiles=8, size=8)
    shard = tmp_path / manifest.shards[0].file
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(DataError, match=rf"the shard {shard} is damaged \(.*\); `shards verify` tells more"):
        select(Metadata(manifest), "")


def test_a_shard_that_is_another_file_is_refused(tmp_path: Path) -> None:
    manifest = make_data_set(tmp_path, tiles=8, size=8)
    shard = tmp_path / manifest.shards[0].file
    pq.write_table(pa.table({"id": ["1"]}), shard)
    for _ in range(2):
        with pytest.raises(
            DataError, match=rf"^the shard {shard} is not the one that the manifest describes \(its digest differs\)"
        ):
            select(Metadata(manifest), "")
        write_shard(shard, [make_block(range(1, 9), 8, 8)], 8)
