"""Tables of labels: what they may hold, and which line is wrong."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mmearth_ray.errors import DataError, UsageError
from mmearth_ray.evaluate.datasets.label_table import encoded, read_table
from mmearth_ray.evaluate.datasets.task import Goal


def table(folder: Path, text: str, encoding: str = "utf-8") -> Any:
    (folder / "labels.csv").write_bytes(text.encode(encoding))
    return read_table(folder / "labels.csv")


def test_columns_go_by_their_names_and_extra_ones_are_ignored(tmp_path: Path) -> None:
    found = table(
        tmp_path, "place,label ,file,split\nx, water ,a.tif,train\ny,forest,b.tif,Val\n\nz,water,c.tif,test\n", "utf-8-sig"
    )
    assert (found.files, found.labels, found.splits) == (["a.tif", "b.tif", "c.tif"], ["water", "forest", "water"],
                                                         ["train", "valid", "test"])  # fmt: skip
    assert (found.fold_count, found.folds.tolist()) == (0, [-1, -1, -1])
    assert found.lines == [2, 3, 5]


def test_folds_and_splits_are_one_or_the_other(tmp_path: Path) -> None:
    found = table(tmp_path, "file,label,split,fold\na,x,,2\nb,y,,0\n")
    assert (found.fold_count, found.folds.tolist(), found.splits) == (3, [2, 0], None)
    assert table(tmp_path, "file,label\na,x\n").splits is None
    with pytest.raises(DataError, match="line 3: a split is given beside a fold"):
        table(tmp_path, "file,label,split,fold\na,x,,2\nb,y,test,0\n")


@pytest.mark.parametrize(
    ("text", "message"),
    [("", "has no column file"), ("file,label\n", "has no row"), ("file,class\na,b\n", "has no column label"),
     ("file,label,split\na,x,train\nb,y,dev\n", "line 3: the split is 'dev'"),
     ("file,label,split\na,x\n", "line 2: the split is ''"),
     ("file,label,fold\na,x,1.5\n", "line 2: the fold is '1.5'"), ("file,label,fold\na,x,-1\n", "line 2: the fold is '-1'"),
     ("file,label,fold\na,x,2018\n", r"whole number of 0\.\.99"), ("file,label\n,x\n", "line 2: no file is given"),
     ("file,label\na\n", "line 2: the label '' is none of the classes"), ("file,label,label\na,b,c\n", "has a column twice"),
     ("file,label\na,x,too,many\n", None)],
)  # fmt: skip
def test_the_line_that_is_wrong_is_named(text: str, message: str | None, tmp_path: Path) -> None:
    if message is None:
        assert table(tmp_path, text).labels == ["x"]
        return
    with pytest.raises(DataError, match=message) as caught:
        encoded(table(tmp_path, text), Goal.SINGLE, [])
    assert "\n" not in str(caught.value)


def test_what_is_no_table_is_told(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="there is no table"):
        read_table(tmp_path / "none.csv")
    with pytest.raises(DataError, match="cannot be read as a CSV"):
        read_table(tmp_path)
    with pytest.raises(DataError, match="cannot be read as a CSV"):
        table(tmp_path, "file,label\na,caf\xe9\n", "latin-1")


def test_classes_are_those_that_occur_in_order_or_those_given(tmp_path: Path) -> None:
    labels, classes = encoded(table(tmp_path, "file,label\na,10\nb,9\nc,10\n"), Goal.SINGLE, [])
    assert (labels.tolist(), classes) == ([1, 0, 1], ("9", "10"))
    found = table(tmp_path, "file,label\na,water\nb,forest\n")
    assert encoded(found, Goal.SINGLE, [])[1] == ("forest", "water")
    labels, classes = encoded(found, Goal.SINGLE, ["water", "bare", "forest"])
    assert (labels.tolist(), classes) == ([0, 2], ("water", "bare", "forest"))
    with pytest.raises(DataError, match="line 3: the label 'forest' is none of the classes water, bare"):
        encoded(found, Goal.SINGLE, ["water", "bare"])


def test_several_classes_one_or_none(tmp_path: Path) -> None:
    labels, classes = encoded(table(tmp_path, "file,label\na,x; y\nb,\nc,z\n"), Goal.MULTI, [])
    assert classes == ("x", "y", "z")
    np.testing.assert_array_equal(labels, [[1, 1, 0], [0, 0, 0], [0, 0, 1]])


def test_numbers(tmp_path: Path) -> None:
    labels, classes = encoded(table(tmp_path, "file,label\na,1.5\nb,-2e3\n"), Goal.REGRESSION, ["height (m)"])
    assert (labels.tolist(), classes) == ([1.5, -2000.0], ("height (m)",))
    for text in ("nan", "inf", "", "tall"):
        with pytest.raises(DataError, match=f"line 2: the label '{text}' is no finite number"):
            encoded(table(tmp_path, f"file,label\na,{text}\n"), Goal.REGRESSION, [])
    with pytest.raises(UsageError, match="a regression has no classes"):
        encoded(table(tmp_path, "file,label\na,1\n"), Goal.REGRESSION, ["a", "b"])
