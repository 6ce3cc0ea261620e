"""A sweep: what it plans, what it measures, that it measures nothing twice, and that failures stop nothing."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from ray.exceptions import OutOfMemoryError, RayError, RayTaskError, WorkerCrashedError
from tiny_sweep import ABOUT, POINTS, TINY, Runner

from benchmarks import sweep_tasks
from benchmarks.computations import make_subject
from benchmarks.sweep import BATCHES, Options, complete, main, plan
from benchmarks.sweep_point import gflop_per_tile, measure, plain_computation
from benchmarks.sweep_store import Store, read_all
from benchmarks.timing import Stopwatch
from mmearth_ray.errors import run_command
from mmearth_ray.model.encoder import SIZES


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path, ABOUT)


# ---- what is planned ----


def test_the_default_is_every_size_once_with_a_batch_that_fits_it() -> None:
    points = plan(Options())
    assert [point.size for point in points] == list(SIZES) == list(BATCHES)
    assert [point.batch for point in points] == list(BATCHES.values())
    assert {(point.image, point.patch, point.device) for point in points} == {(112, 16, points[0].device)}


def test_axes_are_multiplied_and_a_point_named_twice_is_one() -> None:
    points = plan(
        Options(sizes=["atto", "tiny", "atto"], shapes=["56/8", "64/32"], batches=[1, 8], precisions=["fp32", "bf16"])
    )
    assert len(points) == len(set(points)) == 2 * 2 * 2 * 2
    assert {(point.image, point.patch) for point in points} == {(56, 8), (64, 32)}


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("sizes=[atto,mega]", "must be one of atto, femto"),
        ("sizes=[]", "name at least one"),
        ("shapes=[57/8]", "shapes=57/8: image sides must be multiples of the patch size 8; got 57"),
        ("shapes=[56/7]", "shapes=56/7: a patch must be 8, 16, 32 pixels wide; got 7"),
        ("shapes=[0/8]", "got 0"),
        ("shapes=[56x8]", "must be IMAGE/PATCH in pixels, such as 112/16"),
        ("batches=[8,0]", "must be at least 1"),
        ("backends=[dense]", "must be one of packed"),
        ("backends=[triton]", "triton"),
        ("precisions=[fp16]", "must be one of fp32, bf16"),
        ("steps=0", "must be at least 1"),
        ("device=tpu", "must be one of auto, cpu, cuda"),
    ],
)
def test_what_cannot_be_measured_is_refused_in_one_line(
    argument: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command(main, ["device=cpu", f"directory={tmp_path / 'new'}", argument]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert len(said.splitlines()) == 1
    assert not (tmp_path / "new").exists()


# ---- one point ----


def test_a_point_is_measured_and_its_numbers_agree_with_each_other() -> None:
    found = measure(TINY)
    subject = make_subject("atto", 16, 8, 2, torch.device("cpu"))
    assert found.parameters == sum(p.numel() for p in subject.objective.parameters())
    assert found.encoder_parameters == sum(p.numel() for p in subject.objective.model.encoder.parameters())
    assert found.gflop_per_second == pytest.approx(found.gflop_per_tile * found.tiles_per_second)
    parts = found.forward_ms + found.backward_ms + found.optimizer_ms
    assert parts == pytest.approx(1e3 * TINY.batch / found.tiles_per_second)  # one step: its median is itself
    assert min(found.forward_ms, found.backward_ms, found.optimizer_ms, found.gflop_per_tile) > 0
    assert found.plain_ratio is not None
    assert found.plain_ratio > 0


def test_bfloat16_is_measured_and_work_per_tile_depends_neither_on_it_nor_on_the_batch() -> None:
    found = measure(replace(TINY, precision="bf16", batch=1, plain=False))
    assert found.gflop_per_tile == gflop_per_tile(make_subject("atto", 16, 8, 2, torch.device("cpu")))
    assert found.plain_ratio is None


def test_the_plain_computation_leaves_ours_as_it_was() -> None:
    subject = make_subject("atto", 16, 8, 2, torch.device("cpu"))
    before = {name: p.detach().clone() for name, p in subject.objective.named_parameters()}
    watch = Stopwatch(torch.device("cpu"))
    plain_computation(subject)(watch)
    assert set(watch.read()) == {"forward", "backward"}
    assert all(p.grad is None and torch.equal(p, before[name]) for name, p in subject.objective.named_parameters())


# ---- nothing is measured twice ----


def contents(store: Store) -> dict[str, tuple[int, bytes]]:
    """Of every file: when it was written, and what."""
    return {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in sorted(store.folder.iterdir())}


def test_finished_points_are_skipped_and_said_to_be(store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    first, again = Runner(), Runner()
    assert complete(POINTS[:2], store, ABOUT, first) == []
    written = contents(store)
    assert complete(POINTS, store, ABOUT, again) == []
    assert (first.asked, again.asked) == (["atto", "femto"], ["pico"])
    assert written.items() <= contents(store).items()
    assert "2 of 3 points finished before" in capsys.readouterr().out


@pytest.mark.parametrize("left", ["", "{", "half", "null", "[]", '{"point": {}}', "numbers missing"])
def test_a_damaged_file_is_no_finished_point(left: str, store: Store) -> None:
    complete(POINTS[:2], store, ABOUT, Runner())
    path = store.path(POINTS[0])
    whole = path.read_text()
    short = json.loads(whole)
    del short["result"]["tiles_per_second"]
    path.write_text({"half": whole[: len(whole) // 2], "numbers missing": json.dumps(short)}.get(left, left))
    assert [record.point.size for record in read_all(store.folder.parent)] == ["femto"]
    again = Runner()
    complete(POINTS[:2], store, ABOUT, again)
    assert again.asked == ["atto"]
    assert path.read_text().count('"tiles_per_second"') == 1


def test_an_interruption_keeps_what_is_finished(store: Store) -> None:
    with pytest.raises(KeyboardInterrupt):
        complete(POINTS, store, ABOUT, Runner(stop_after=2))
    written, again = contents(store), Runner()
    assert len(written) == 2
    complete(POINTS, store, ABOUT, again)
    assert again.asked == ["pico"]
    assert written.items() <= contents(store).items()


@pytest.mark.parametrize("change", [{"torch": "0.1"}, {"device": "an abacus"}, {"cores": 1000}])
def test_another_machine_or_pytorch_is_measured_anew(change: dict[str, Any], store: Store) -> None:
    complete(POINTS[:1], store, ABOUT, Runner())
    other = Store(store.folder.parent, ABOUT | change)
    assert store.is_finished(TINY)
    assert not other.is_finished(TINY)
    assert Store(store.folder.parent, ABOUT | {"date": "1900-01-01", "command": "another"}).is_finished(TINY)
    assert not store.is_finished(replace(TINY, steps=2))


# ---- failures ----


def test_a_failed_point_stops_nothing_and_is_tried_again(store: Store) -> None:
    failed = complete(POINTS, store, ABOUT, Runner(failing=["femto"]))
    assert [(record.point.size, record.failure) for record in failed] == [("femto", "its process <died> | twice")]
    assert [record.result is None for record in read_all(store.folder.parent)] == [False, True, False]
    again = Runner()
    assert complete(POINTS, store, ABOUT, again) == []
    assert again.asked == ["femto"]
    assert all(record.result for record in read_all(store.folder.parent))


def test_the_command_names_failed_points_after_its_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sweep_tasks, "run_tasks", Runner(failing=["femto"]))
    arguments = ["sizes=[atto,femto]", "shapes=[16/8]", "device=cpu", f"directory={tmp_path}"]
    assert run_command(main, arguments) == 1
    assert "1 of 2 points failed (femto 16/8 batch 32 packed fp32 cpu: its process" in capsys.readouterr().err
    assert "its process" in (tmp_path / "report.html").read_text()
    monkeypatch.setattr(sweep_tasks, "run_tasks", again := Runner())
    assert run_command(main, arguments) == 0
    assert again.asked == ["femto"]
    assert "its process" not in (tmp_path / "report.html").read_text()


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (WorkerCrashedError(), "its process died"),
        (OutOfMemoryError("the node is full"), "memory of its machine was nearly full"),
        (RayTaskError("measure_here", "Traceback ...", RuntimeError("no memory:\n 5 bytes")), "RuntimeError: no memory:"),
        (RayError("gone"), "Ray lost it (RayError)"),
    ],
)
def test_reasons_of_failures_are_one_line(error: RayError, message: str) -> None:
    assert message in sweep_tasks.reason(error)
    assert "\n" not in sweep_tasks.reason(error)
