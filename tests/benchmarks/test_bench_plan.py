"""The benchmark of the plan: what it refuses, and that a measurement is near what was planned."""

import os

import pytest

from benchmarks import bench_plan
from benchmarks.bench_plan import Options, config_of, main, measured_row, write_plan
from mmearth_ray.errors import UsageError


@pytest.mark.parametrize("case", ["atto", "atto/ddp/1", "atto/fsdp/1/4", "atto/ddp/one/4", "atto/ddp/1/4/5"])
def test_what_is_no_case_is_refused(case: str) -> None:
    with pytest.raises(UsageError, match="must be SIZE/ENGINE/WORKERS/MICRO-BATCH"):
        config_of(Options(), case)


def test_a_case_is_a_run() -> None:
    config = config_of(Options(micro_batches=3, precision="bf16"), "tiny/zero2/2/4")
    assert (config.model.size, config.train.engine, config.train.workers) == ("tiny", "zero2", [2])
    assert (config.train.global_batch, config.train.micro_batch, config.train.precision) == (24, 4, "bf16")


@pytest.mark.drill
@pytest.mark.long
def test_a_measured_peak_is_near_the_planned_one_and_the_environment_stays() -> None:
    before = dict(os.environ)
    row = measured_row(config_of(Options(), "atto/ddp/1/8"))
    assert dict(os.environ) == before
    assert row["measured MB"] > 100
    assert 0.85 < row["ratio"] < 1.15


def test_the_plan_of_all_sizes_is_written_as_it_is_printed(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    monkeypatch.setattr(bench_plan, "RESULTS", tmp_path)
    small = [*bench_plan.PUBLISHED[2:-1], "model.image_size=16", "model.patch_size=8"]
    monkeypatch.setattr(bench_plan, "PUBLISHED", small)
    text = write_plan({"date": "2001-01-01", "commit": "abc"}).read_text()
    assert "commit abc" in text
    assert "58,594 steps" in text
    assert text.rstrip().endswith("```")


def test_help_lists_the_keys(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    assert "cases=[atto/ddp/1/8" in capsys.readouterr().out
