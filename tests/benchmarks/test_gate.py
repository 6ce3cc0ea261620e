"""The regression gate: worse ratios fail it, in lines that say by how much; what cannot be compared is skipped."""

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from benchmarks import bench_pretrain, bench_scaling
from benchmarks.bench_pretrain import Round
from benchmarks.end_to_end import Passage
from benchmarks.gate import RATIOS, main, regressions
from benchmarks.side_by_side import Pace
from mmearth_ray.errors import run_command

Row = dict[str, Any]


def row(backend: str = "packed", **measured: float | None) -> Row:
    return {"size": "atto", "batch": 32, "computation": backend, "tiles/s": 30.0, **measured}


def ratios(plain: float, memory: float) -> Row:
    return {"times plain": plain, "memory of plain": memory}


def result(*rows: Row, device: str = "a processor") -> str:
    return json.dumps({"about": {"device": device}, "rows": rows})


class Repository:
    """A git repository whose folder of results holds what it is told to."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.git("init", "--quiet")
        (folder / "README").write_text("results")
        self.commit()

    def git(self, *arguments: str) -> None:
        who = ["-c", "user.name=somebody", "-c", "user.email=somebody@example.org", "-c", "commit.gpgsign=false"]
        subprocess.run(["git", "-C", str(self.folder), *who, *arguments], check=True, capture_output=True)

    def write(self, name: str, text: str) -> None:
        (self.folder / name).write_text(text)

    def commit(self) -> None:
        self.git("add", ".")
        self.git("commit", "--quiet", "-m", "results")

    def gate(self, *arguments: str) -> int:
        return run_command(main, [f"results={self.folder}", *arguments])


@pytest.fixture
def repository(tmp_path: Path) -> Repository:
    return Repository(tmp_path)


@pytest.mark.parametrize(
    ("plain", "memory", "worse"),
    [
        (4.0, 0.5, []),
        (3.41, 0.574, []),
        (9.0, 0.1, []),
        (3.39, 0.5, ["times plain"]),
        (4.0, 0.576, ["memory of plain"]),
        (1.0, 1.0, ["times plain", "memory of plain"]),
    ],
)
def test_a_ratio_may_be_worse_by_the_tolerance_and_no_more(plain: float, memory: float, worse: list[str]) -> None:
    found = regressions([row(**ratios(4.0, 0.5))], [row(**ratios(plain, memory))], 0.15)
    assert [r.name.rpartition(", ")[2] for r in found] == worse


def test_rates_do_not_count_and_neither_do_rows_that_one_side_lacks_or_new_ratios() -> None:
    before = [row(**ratios(4.0, 0.5)), row("gone", **ratios(9.0, 0.1)), row("empty", **{"times plain": None})]
    now = [row(**ratios(4.0, 0.5)) | {"tiles/s": 1.0}, row("new", **ratios(0.1, 9.0)), row("empty", **ratios(0.1, 9.0))]
    assert regressions(before, now, 0.0) == []


@pytest.mark.parametrize("now", [row() | {"memory of plain": 0.5}, row(**ratios(float("nan"), 0.5)),
                                 row(**{"times plain": None, "memory of plain": 0.5})])  # fmt: skip
def test_a_ratio_that_a_row_has_no_longer_is_a_regression(now: Row) -> None:
    (found,) = regressions([row(**ratios(4.0, 0.5))], [now], 0.15)
    assert str(found) == "atto 32 packed, times plain: before 4, now missing, allowed 3.4"


def test_the_ratios_of_the_end_to_end_and_scaling_benchmarks_are_known() -> None:
    one = Pace(10.0, 0.1, 1, 1)
    paces = dict.fromkeys([(n, way) for n in (1, 2) for way in ("bare", "plain")], one)
    rows = [
        bench_pretrain.summary(bench_pretrain.Options(), (112, 16, 128), [Round(one, one, Passage(10.0, 0.1, {}, 1))]),
        bench_scaling.scaling_row(bench_scaling.Options(workers=[1, 2]), 2, [paces], None),
    ]
    shares = [{name for name in measured if " / " in name or name.startswith(("of ", "efficiency"))} for measured in rows]
    assert [len(names) for names in shares] == [3, 2]
    assert set.union(*shares) <= RATIOS.keys()


def test_a_regression_fails_with_name_before_now_and_allowed(
    repository: Repository, capsys: pytest.CaptureFixture[str]
) -> None:
    repository.write("step_cpu2_2026-01-02.json", result(row(**ratios(4.0, 0.5))))
    repository.write("step_cpu2_2026-01-01.json", result(row(**ratios(99.0, 0.001))))  # older: not what counts
    repository.commit()
    repository.write("step_cpu2_2026-01-03.json", result(row(**ratios(3.0, 0.5))))
    assert repository.gate() == 1
    assert capsys.readouterr().out.splitlines() == [
        "step_cpu2: 2 ratios compared, 1 worse",
        "  atto 32 packed, times plain: before 4, now 3, allowed 3.4",
    ]
    assert repository.gate("tolerance=0.3") == 0


def test_a_result_measured_again_on_the_same_day_is_compared_with_the_committed_one(repository: Repository) -> None:
    repository.write("step_gpu_2026-01-02.json", result(row(**ratios(4.0, 0.5))))
    repository.commit()
    repository.write("step_gpu_2026-01-02.json", result(row(**ratios(2.0, 0.5))))
    assert repository.gate() == 1


@pytest.mark.parametrize(
    ("committed", "fresh", "reason"),
    [
        ("", result(row(**ratios(4.0, 0.5))), "nothing is committed to compare with"),
        (result(row(**ratios(4.0, 0.5))), "", "nothing was measured since the last commit"),
        (result(row(**ratios(4.0, 0.5))), result(row(**ratios(1.0, 0.5)), device="another"),
         "it was measured on another, the committed one on a processor"),
        (result(row(**ratios(4.0, 0.5))), result(row("triton", **ratios(1.0, 0.5))),
         "they have no row in common"),
        (result(row()), result(row(**ratios(1.0, 0.5))),
         "the rows they have in common have no known column of ratios in the committed one"),
    ],
)  # fmt: skip
def test_what_cannot_be_compared_is_skipped_with_the_reason(
    repository: Repository, capsys: pytest.CaptureFixture[str], committed: str, fresh: str, reason: str
) -> None:
    if committed:
        repository.write("step_cpu2_2026-01-02.json", committed)
        repository.commit()
    if fresh:
        repository.write("step_cpu2_2026-01-03.json", fresh)
    assert repository.gate() == 0
    assert capsys.readouterr().out == f"step_cpu2: skipped, {reason}\n"


def test_kinds_of_hardware_and_themes_are_not_mixed(repository: Repository, capsys: pytest.CaptureFixture[str]) -> None:
    repository.write("step_cpu2_2026-01-02.json", result(row(**ratios(4.0, 0.5))))
    repository.commit()
    repository.write("step_gpu_2026-01-03.json", result(row(**ratios(1.0, 0.5))))
    repository.write("backends_cpu2_2026-01-03.json", result(row(**ratios(1.0, 0.5))))
    assert repository.gate() == 0
    assert capsys.readouterr().out.count("skipped") == 3


def test_outside_git_there_is_nothing_to_compare_with(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "step_cpu2_2026-01-03.json").write_text(result(row(**ratios(4.0, 0.5))))
    assert run_command(main, [f"results={tmp_path}"]) == 0
    assert capsys.readouterr().out == f"skipped, {tmp_path} is in no git repository: there is nothing to compare with\n"


def test_a_broken_repository_or_result_is_answered_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / ".git").write_text("neither a repository nor a pointer to one")
    assert run_command(main, [f"results={tmp_path}"]) == 1
    assert capsys.readouterr().err.startswith(f"error: git cannot tell what is committed in {tmp_path}: ")
    (tmp_path / ".git").unlink()
    repository = Repository(tmp_path)
    repository.write("step_cpu2_2026-01-02.json", "{")
    assert repository.gate() == 1
    assert capsys.readouterr().err.startswith("error: the result step_cpu2_2026-01-02.json is not JSON")
