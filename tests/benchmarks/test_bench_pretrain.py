"""Pretraining end to end against bare steps: ratios, roles of processes, waits, and one small run of everything."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_earth import make_data_set

from benchmarks.bench_pretrain import Options, Round, main, run_arguments, shape_of, spending, summary
from benchmarks.end_to_end import Passage, _reach, data_wait, stop, watch
from benchmarks.process_tree import DAEMONS, DRIVER, IDLE, TASKS, WORKERS, Tree, descendants, role_of
from benchmarks.side_by_side import Pace
from mmearth_ray import config as configuration
from mmearth_ray.errors import DataError, UsageError
from mmearth_ray.train.journal import METRICS


def a_round(bare: float, ddp: float, run: float) -> Round:
    cpu = {WORKERS: 0.04, TASKS: 0.002, "raylet": 0.001, DRIVER: 0.0005}
    return Round(Pace(bare, 0.03, 0, 0), Pace(ddp, 0.035, 1, 1), Passage(run, 0.01, cpu, 2_000_000_000), "bf16")


def test_ratios_are_medians_of_the_rounds_own() -> None:
    rounds = [a_round(50, 48, 45), a_round(10, 9.5, 9.5), a_round(100, 90, 80)]
    row = summary(Options(), (112, 16, 128), rounds)
    assert row["end to end / bare"] == 0.9
    assert row["end to end / DDP"] == 45 / 48
    assert row["DDP / bare"] == 0.95
    assert row["end to end tiles/s"] == 45
    assert row["peak GB"] == 2
    assert row["precision"] == "bf16"


def test_spending_adds_up_to_all_but_the_train_workers() -> None:
    row = spending((112, 16, 128), [a_round(50, 48, 45)])
    assert row["bare"] == 30
    assert row[WORKERS] == 40
    assert row["gcs"] == 0
    assert row["all but train workers"] == pytest.approx(3.5)


def test_the_wait_for_data_is_a_share_of_time_not_of_steps() -> None:
    lines = [{"tiles_per_second": 10.0, "data_wait": 0.5}, {"tiles_per_second": 30.0, "data_wait": 0.1}]
    assert data_wait(lines, tiles=30) == pytest.approx((3 * 0.5 + 1 * 0.1) / 4)


def test_shapes_are_three_numbers() -> None:
    assert shape_of("112/16/128") == (112, 16, 128)
    with pytest.raises(UsageError, match=r"'112/16' is not of the form"):
        shape_of("112/16")


def test_the_arguments_are_a_run_of_the_asked_batch_that_writes_nothing_on_the_way(tmp_path: Path) -> None:
    arguments = run_arguments(Options(workers=3, batch=4), tmp_path, tmp_path / "run", 32, 8)
    config = configuration.load(arguments)
    assert (config.train.workers, config.train.global_batch, configuration.micro_batch_of(config, 3)) == ([3], 12, 4)
    assert config.checkpoint.every == config.train.steps
    assert config.validate.tiles == config.figure.tiles == 0


@pytest.mark.parametrize(
    ("command", "role"),
    [
        (["ray::RayTrainWorker.execute"], WORKERS),
        (["ray::MapBatches(_Prepare)"], TASKS),
        (["ray::IDLE"], IDLE),
        (["ray::TrainController"], "actors"),
        (["/x/ray/core/src/ray/raylet/raylet", "--log_monitor"], "raylet"),
        (["/x/gcs_server"], "gcs"),
        (["python", "/x/log_monitor.py"], DAEMONS),
        ([], DAEMONS),
    ],
)
def test_processes_have_the_role_of_their_title_or_program(command: list[str], role: str) -> None:
    assert role_of(command) == role


def test_a_worker_counts_as_what_it_ran_last_even_before_it_ran() -> None:
    tree = Tree(1, roles={1: DRIVER, 2: TASKS, 3: IDLE})
    assert tree.spent({1: 1.0, 2: 5.0}, {1: 1.5, 2: 7.0, 3: 0.25}) == {DRIVER: 0.5, TASKS: 2.0, IDLE: 0.25}


def test_the_time_and_memory_of_child_processes_are_seen() -> None:
    busy = "import time\nwhile time.process_time() < 0.3: pass\nprint(flush=True)\ntime.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", busy], stdout=subprocess.PIPE, text=True) as child:
        try:
            tree = Tree(os.getpid())
            assert child.stdout is not None
            child.stdout.readline()
            seconds = tree.look()
            assert child.pid in descendants(os.getpid())
            assert seconds[child.pid] >= 0.28
            assert tree.roles[os.getpid()] == DRIVER
            assert tree.peak > 10_000_000
        finally:
            child.kill()


def test_a_run_that_ends_by_itself_is_reported_with_its_last_line(tmp_path: Path) -> None:
    log = tmp_path / "run.log"
    log.write_text("much\nerror: nowhere is no data set\n")
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        process.wait()
        with pytest.raises(DataError, match=r"the run ended before step 1: error: nowhere is no data set"):
            _reach(process, Tree(process.pid), tmp_path / "metrics.jsonl", 1, log)


def test_a_run_that_stands_still_is_given_up_but_every_step_renews_its_time(tmp_path: Path) -> None:
    log, metrics = tmp_path / "run.log", tmp_path / "metrics.jsonl"
    log.write_text("waiting\n")
    code = "import sys, time\nfor _ in range(4): open(sys.argv[1], 'a').write('{}\\n'); time.sleep(0.4)\ntime.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", code, str(metrics)]) as process:
        try:
            with pytest.raises(DataError, match=r"made no step in 1 s after 4 steps; its log ends: waiting"):
                _reach(process, Tree(process.pid), metrics, 5, log, patience=1)
        finally:
            assert stop(process) == -signal.SIGTERM


def test_a_process_that_does_not_end_when_asked_to_is_killed() -> None:
    deaf = "import signal, time\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\nprint(flush=True)\ntime.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", deaf], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        process.stdout.readline()
        assert stop(process, patience=0.1) == -signal.SIGKILL


@pytest.mark.parametrize(("code", "fails"), [(0, False), (3, True)])
def test_a_run_that_does_not_end_well_when_asked_to_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, fails: bool
) -> None:
    program = tmp_path / "program"
    program.write_text(
        f"#!{sys.executable}\n"
        "import signal, sys, time\n"
        f"signal.signal(signal.SIGTERM, lambda *_: (print('error: the disk is full', flush=True), sys.exit({code})))\n"
        'line = \'{"tiles_per_second": 8.0, "data_wait": 0.25}\\n\'\n'
        "while True: open(sys.argv[-1], 'a').write(line); time.sleep(0.1)\n"
    )
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))
    (tmp_path / "run").mkdir()
    arguments = [str(tmp_path / "run" / METRICS)]
    if fails:
        with pytest.raises(DataError, match=r"exit code 3 when it was asked to stop: error: the disk is full"):
            watch(arguments, tmp_path / "run", tiles=4, warm=1, steps=2)
    else:
        assert watch(arguments, tmp_path / "run", tiles=4, warm=1, steps=2).data_wait == 0.25


@pytest.mark.drill
@pytest.mark.long
def test_everything_is_measured_for_real(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_data_set(tmp_path, tiles=40, size=32)
    code = main([
        f"data={tmp_path}", "shapes=[32/8/32]", "batch=2", "warm=2", "steps=4", "rounds=1",
        "extra=[model.decoder_width=8]", "save=false",
    ])  # fmt: skip
    assert code == 0
    rates, row, costs = (line for line in capsys.readouterr().out.splitlines() if "32/8" in line)
    assert "end to end" in rates
    assert all(float(cell) > 0 for cell in row.split("|")[7:13])
    spent = [float(cell) for cell in costs.split("|")[2:-1]]
    assert spent[-1] == pytest.approx(sum(spent[3:-1]), rel=1e-3)
