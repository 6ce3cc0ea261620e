"""The commands for one encoder: features are kept and told of, scores printed with intervals."""

import csv
from pathlib import Path

import pytest
from tiny_task import tiny_task

from mmearth_ray.errors import DataError, UsageError
from mmearth_ray.evaluate.__main__ import main
from mmearth_ray.evaluate.compare import comparison
from mmearth_ray.evaluate.datasets.task import Goal


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("single")
    tiny_task(root / "task", Goal.MULTI, images=30, classes=3)
    return root


def test_features_are_kept_and_told_of(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["features", "encoder=random:atto/16", f"dataset={root / 'task'}", f"out={root / 'features'}", "workers=0"]
    assert main(arguments) == 0
    said = capsys.readouterr().out
    folder = next((root / "features").iterdir())
    assert f"{folder}: 30 images, 320 features each, " in said
    assert "CPU-seconds per image" in said
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert main(arguments) == 0
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == before


def test_scores_are_printed_with_intervals_and_written_if_asked(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["score", "encoder=statistics", f"dataset={root / 'task'}", f"cache={root / 'features'}", "workers=0",
                 "bootstrap=50", f"csv={root / 'scores.csv'}"]  # fmt: skip
    assert main(arguments) == 0
    lines = capsys.readouterr().out.splitlines()
    head = next(i for i, line in enumerate(lines) if line.startswith("protocol"))
    found = {tuple(line.split()[:2]): line.split()[2:] for line in lines[head + 1 :]}
    assert set(found) == {(p, m) for p in ("knn", "logistic") for m in ("micro_f1", "macro_f1", "map")}
    value, low, high = map(float, found["knn", "micro_f1"][:3])
    assert low <= value <= high
    with (root / "scores.csv").open() as file:
        written = {(row["method"], row["metric_name"]): float(row["metric_value"]) for row in csv.DictReader(file)}
    assert written["knn5", "micro_f1"] == pytest.approx(value, abs=1e-4)
    assert len(written) == 6


def test_a_score_that_fails_is_an_error(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: object) -> object:
        raise DataError("outputs are not finite")

    monkeypatch.setattr(comparison, "score_point", fail)
    with pytest.raises(DataError, match="2 of 2 points failed: outputs are not finite"):
        main(["score", "encoder=statistics", f"dataset={root / 'task'}", f"cache={root / 'features'}", "workers=0"])


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["features", "dataset=x"], "x is no labelled data set"),
        (["score", "encoder=statistics"], "dataset=: name the folder"),
        (["score", "encoder=", "dataset=TASK"], "encoder=: name a run"),
        (["score", "encoder=statistics", "dataset=TASK", "protocols=[probe]"], "needs an encoder"),
        (["score", "encoder=statistics", "dataset=TASK", "protocols=[knn,knn]"], "each once"),
        (["score", "encoder=random:atto/16", "dataset=TASK", "normalisation=pretraining"], "has no statistics"),
    ],
)
def test_settings_that_cannot_work_are_refused(root: Path, arguments: list[str], said: str) -> None:
    with pytest.raises((UsageError, DataError), match=said):
        main([argument.replace("TASK", str(root / "task")) for argument in arguments])
