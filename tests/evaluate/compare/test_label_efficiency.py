"""Label efficiency from command to report: nothing is computed twice, other settings are refused, failures are shown."""

import csv
import json
import re
import shlex
import signal
import subprocess
import sys
import time
from html import unescape
from pathlib import Path
from shutil import copytree

import pytest
from tiny_task import tiny_task

from mmearth_ray.errors import DataError, UsageError
from mmearth_ray.evaluate.__main__ import main
from mmearth_ray.evaluate.compare import comparison
from mmearth_ray.evaluate.compare.score import Work, score_point
from mmearth_ray.files import locked
from mmearth_ray.report import efficiency

KEYS = ["label-efficiency", "encoders=[random:atto/16/9]", "names=[ours]", "protocols=[knn,logistic]", "fractions=[0.5,1.0]",
        "seeds=2", "steps=1", "bootstrap=20", "workers=0"]  # fmt: skip
POINTS = 2 * (2 + 1) + 2 * 2 * 2 + 2 * 2 + 2 * (2 + 1)
"""Of ours and of band statistics, whose results with all labels depend on no seed; of the random and the supervised one."""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a data set, features and a finished comparison."""
    root = tmp_path_factory.mktemp("efficiency")
    tiny_task(root / "task", images=30, size=16, classes=3)
    assert main(command(root)) == 0
    return root


@pytest.fixture
def root(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The same, in a copy that a test may change; its figures, which take most of the time, are not drawn again."""
    monkeypatch.setattr(efficiency, "draw", lambda panels: panels)
    monkeypatch.setattr(efficiency, "png", lambda panels: b"\x89PNG")
    return copytree(made, tmp_path / "copy")


def command(root: Path, *more: str) -> list[str]:
    return [*KEYS, f"dataset={root / 'task'}", f"cache={root / 'cache'}", f"out={root / 'out'}", *more]


def rows(root: Path) -> list[dict[str, str]]:
    with (root / "out" / "results.csv").open() as file:
        return list(csv.DictReader(file))


def times(root: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in (root / "out" / "points").iterdir()}


def counting(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Points that are computed from now on."""
    found: list[str] = []

    def note(work: Work) -> object:
        found.append(str(work.point))
        return score_point(work)

    monkeypatch.setattr(comparison, "score_point", note)
    return found


def test_the_report_holds_every_encoder_and_baseline_with_intervals(made: Path) -> None:
    assert len(times(made)) == 2 * POINTS
    found = {(row["name"], row["method"], row["partition"]) for row in rows(made)}
    for name, methods in {"ours": ("knn5", "linear"), "random atto/16": ("knn5", "linear"), "supervised atto/16": ("finetune",),
                          "band statistics": ("knn5", "linear")}.items():  # fmt: skip
        assert all((name, method, part) in found for method in methods for part in ("own 0.5 of default", "default"))
    primary = [row for row in rows(made) if row["metric_name"] == "accuracy"]
    assert len(primary) == POINTS
    assert all(float(row["ci_lower"]) <= float(row["metric_value"]) <= float(row["ci_upper"]) for row in primary)
    html = (made / "out" / "report.html").read_text()
    shown = re.search(r"<code>(python -m mmearth_ray.evaluate label-efficiency [^<]*)</code>", html)
    assert shown
    assert set(shlex.split(unescape(shown[1]))[3:]) == set(command(made))
    assert all(name in html for name in ("ours", "random atto/16", "supervised atto/16", "band statistics", "Paired diff"))
    assert html.count("data:image/png;base64,") == 2
    assert not re.search(r"(src|href)=\"(?!data:)|https?://|<script", html)


def test_a_restart_computes_nothing_that_is_done(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before, computed = times(root), counting(monkeypatch)
    assert main(command(root)) == 0
    assert computed == []
    assert times(root) == before
    lost = sorted((root / "out" / "points").glob("*.json"))[:3]
    for path in lost:
        path.unlink()
    assert main(command(root)) == 0
    assert len(computed) == 3
    assert {name: at for name, at in times(root).items() if name[:32] not in {p.stem for p in lost}} == {
        name: at for name, at in before.items() if name[:32] not in {p.stem for p in lost}
    }


def test_fractions_seeds_and_protocols_may_grow(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before, computed = times(root), counting(monkeypatch)
    assert main(command(root, "fractions=[0.2,0.5,1.0]", "supervised=true", "protocols=[knn,logistic]", "names=[renamed]")) == 0
    assert len(computed) == (2 + 2 + 2) * 2 + 2  # a fraction more, of three with two protocols and the supervised one
    assert all("20 % of labels" in point for point in computed)
    assert before.items() <= times(root).items()
    assert "renamed" in (root / "out" / "report.html").read_text()


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ("k=3", "k=5, this command says 3"),
        ("steps=2", "steps=1, this command says 2"),
        ("recipe=published", "recipe=converged, this command says published"),
        ("bootstrap=30", "bootstrap=20"),
        ("fractions=[1.0]", "fractions 0.5, which this command leaves out"),
        ("seeds=1", "seeds 1, which this command leaves out"),
        ("supervised=false", "baselines supervised, which this command leaves out"),
        ("encoders=[random:atto/16/8]", "encoder random:atto/16/9, which this command leaves out"),
    ],
)
def test_other_settings_in_the_same_folder_are_refused(made: Path, changed: str, said: str) -> None:
    before = times(made)
    with pytest.raises(UsageError, match=said):
        main(command(made, changed))
    assert times(made) == before


def test_another_data_set_in_the_same_folder_is_refused(root: Path) -> None:
    tiny_task(root / "task", images=30, size=16, classes=3, seed=1)
    with pytest.raises(UsageError, match="dataset=tiny-single-label"):
        main(command(root))


def test_two_commands_do_not_compute_in_one_folder(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before, computed = times(made), counting(monkeypatch)
    with (
        locked(made / "out", "is comparing encoders in", "out"),
        pytest.raises(UsageError, match="another command is comparing"),
    ):
        main(command(made, "fractions=[0.2,0.5,1.0]"))
    assert computed == []
    assert times(made) == before


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ("dataset=", "dataset=: name the folder"),
        ("encoders=[]", "name at least one"),
        ("fractions=[0.5,0.5]", "each once"),
        ("fractions=[0.0]", "must be above 0"),
        ("protocols=[]", "protocols=\\[\\]"),
        ("normalisation=pretraining", "has no statistics"),
        ("encoders=[nowhere]", "there is no encoder 'nowhere'"),
        ("gpus=true", "workers=0"),
    ],
)
def test_settings_that_cannot_work_are_refused_before_anything_is_computed(made: Path, more: str, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        main([*command(made), f"out={made / 'never'}", more])
    assert not (made / "never").exists()


def test_failures_are_shown_kept_apart_and_tried_again(
    root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(work: Work) -> object:
        if work.point.label == "ours":
            raise DataError("features of encoder 'ours' <for image 7> are not finite")
        raise KeyError("a bug")

    for path in sorted((root / "out" / "points").glob("*.npz"))[:4]:
        path.unlink()
    monkeypatch.setattr(comparison, "score_point", fail)
    with pytest.raises(DataError, match=r"4 of 24 points failed, see .*report\.html; the same command tries them again"):
        main(command(root))
    html, failed = (root / "out" / "report.html").read_text(), [row for row in rows(root) if row["failure"]]
    assert "<h2>Failures</h2>" in html
    assert len(failed) == 4
    for row in failed:
        known = ("&lt;for image 7&gt; are not finite", "KeyError")
        assert any(said in html for said in known)
        assert row["metric_value"] == ""
    assert "failed:" in capsys.readouterr().out
    monkeypatch.setattr(comparison, "score_point", score_point)
    assert main(command(root)) == 0
    assert not any(row["failure"] for row in rows(root))
    assert "<h2>Failures</h2>" not in (root / "out" / "report.html").read_text()


def test_features_that_fail_take_only_their_encoder_along(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compute = comparison.compute

    def fail(subject: object, *rest: object, **more: object) -> object:
        if getattr(subject, "name", "") == "ours":
            raise DataError("encoder 'ours' gives features of image-001 that are not finite")
        return compute(subject, *rest, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(comparison, "compute", fail)
    with pytest.raises(DataError, match="6 of 24 points failed"):
        main([*command(root), f"out={root / 'fresh'}"])
    with (root / "fresh" / "results.csv").open() as file:
        lost = {(row["name"], row["failure"]) for row in csv.DictReader(file) if row["failure"]}
    assert lost == {("ours", "encoder 'ours' gives features of image-001 that are not finite")}


def test_killed_half_way_it_goes_on_where_it_was(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = command(root, f"out={root / 'killed'}")
    process = subprocess.Popen([sys.executable, "-m", "mmearth_ray.evaluate", *arguments], stdout=subprocess.DEVNULL)
    points = root / "killed" / "points"
    while process.poll() is None and len(list(points.glob("*.json"))) < 4:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = {path.name: path.stat().st_mtime_ns for path in points.glob("*.json")}
    assert 4 <= len(done) < POINTS
    computed = counting(monkeypatch)
    assert main(arguments) == 0
    assert len(computed) == POINTS - len(done)
    assert all((points / name).stat().st_mtime_ns == at for name, at in done.items())
    assert not list(points.glob(".*"))
    kept = {json.loads(path.read_text())["point"]["label"] for path in points.glob("*.json")}
    assert kept == {"ours", "random atto/16", "supervised atto/16", "band statistics"}
