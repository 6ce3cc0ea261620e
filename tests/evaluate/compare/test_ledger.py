"""run.json: lists may grow, all else stays, and what differs is named."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from mmearth_ray.errors import DataError, UsageError
from mmearth_ray.evaluate.compare.ledger import FORM, Ledger

LEDGER = Ledger(
    fixed={"dataset": "tiny", "recipe": "converged", "steps": None},
    growing={"fractions": [0.1, 1.0], "protocols": ["knn"]},
    encoders={"d1": "runs/a", "d2": "runs/b"},
)


def test_the_same_again_and_more_of_it(tmp_path: Path) -> None:
    out = tmp_path / "new" / "out"
    LEDGER.keep(out, {"command": "first"})
    LEDGER.keep(out, {"command": "again"})
    grown = replace(LEDGER, growing={"fractions": [1.0, 0.5, 0.1], "protocols": ["probe", "knn"]},
                    encoders={"d3": "runs/c", **LEDGER.encoders})  # fmt: skip
    grown.keep(out, {"command": "more"})
    found = json.loads((out / "run.json").read_text())
    assert found["command"] == "more"
    assert found["growing"]["fractions"] == [1.0, 0.5, 0.1]
    assert set(found["encoders"]) == {"d1", "d2", "d3"}


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        (replace(LEDGER, fixed={**LEDGER.fixed, "recipe": "published"}), "recipe=converged, this command says published"),
        (replace(LEDGER, fixed={**LEDGER.fixed, "steps": 300}), "steps=null, this command says 300"),
        (replace(LEDGER, growing={"fractions": [1.0], "protocols": ["knn"]}), "fractions 0.1, which this command leaves out"),
        (replace(LEDGER, encoders={"d1": "runs/a"}), "encoder runs/b, which this command leaves out"),
        (replace(LEDGER, encoders={"d1": "runs/a", "d9": "runs/b"}), "encoder runs/b, whose weights or statistics are others"),
    ],
)
def test_what_differs_is_refused_by_name(tmp_path: Path, changed: Ledger, said: str) -> None:
    LEDGER.keep(tmp_path, {})
    before = (tmp_path / "run.json").read_text()
    with pytest.raises(UsageError, match=said):
        changed.keep(tmp_path, {})
    assert (tmp_path / "run.json").read_text() == before


@pytest.mark.parametrize("content", ["{", "[]", '{"form": 99}', "{}", f'{{"form": {FORM}}}'])
def test_a_file_of_another_kind_is_not_overwritten(tmp_path: Path, content: str) -> None:
    (tmp_path / "run.json").write_text(content)
    with pytest.raises(DataError, match="name another folder as out="):
        LEDGER.keep(tmp_path, {})
    assert (tmp_path / "run.json").read_text() == content
