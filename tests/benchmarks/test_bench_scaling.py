"""Scaling: what rows say of given rates, what is counted of a model, and a small real measurement."""

from pathlib import Path

import pytest
import torch
from tiny_earth import make_data_set

from benchmarks.bench_scaling import MESSAGES, Options, Paces, engine_row, main, message_rows, model_rows, scaling_row, work
from benchmarks.communication import Link
from benchmarks.side_by_side import Pace
from benchmarks.subject import build


def paces(one: float, bare: float, two: float) -> Paces:
    """A round: rates of one worker, of two bare processes, and of two that share gradients of 8 MB."""
    rates = {(1, "bare"): one, (1, "plain"): one, (2, "bare"): bare, (2, "plain"): two, (2, "ddp"): two, (2, "zero3"): two / 2}
    return {of: Pace(rate, 0.0, 8e6, 9e6, 7e6) for of, rate in rates.items()}


def test_ratios_are_medians_of_the_rounds_own() -> None:
    options = Options(batch=10, workers=[1, 2], threads=1)
    rounds = [paces(10, 20, 18), paces(100, 180, 170), paces(1, 2, 1.9)]
    row = scaling_row(options, 2, rounds, Link(8e6, 0.0))
    assert row["efficiency against 1"] == 0.9
    assert row["of bare processes"] == pytest.approx(17 / 18)
    assert row["MB sent by a ring"] == 8
    assert row["MB over loopback"] == 9
    assert row["the same, modelled"] == 0.5  # the median step of 20 tiles takes a second, and so does sending 8 MB
    assert scaling_row(options, 1, rounds, None)["the same, modelled"] == 1


def test_an_engine_is_compared_with_the_first_one_of_its_round() -> None:
    options = Options(batch=10, workers=[2], engines=["ddp", "zero3"])
    rounds = [paces(10, 20, 18), paces(100, 180, 170), paces(1, 2, 1.9)]
    rows = [engine_row(options, 2, engine, rounds) for engine in options.engines]
    assert [row["engine"] for row in rows] == options.engines
    assert [row["tiles/s"] for row in rows] == [18, 9]
    assert [row["tiles/s of ddp's"] for row in rows] == [1, 0.5]
    assert rows[1]["peak MB of a worker"] == 7


def test_more_threads_than_cores_are_named() -> None:
    row = scaling_row(Options(threads=10_000), 1, [paces(1, 1, 1)], None)
    assert row["workers x threads"] == "1 x 10000 (oversubscribed)"


def test_the_fit_stands_beside_what_was_measured() -> None:
    rows = message_rows({2: [size / 1e6 for size in MESSAGES]}, {2: Link(1e6, 0.0)})
    assert [row["measured"] for row in rows] == pytest.approx([row["fitted"] for row in rows])


def test_parameters_are_those_of_the_model_that_is_trained() -> None:
    parameters, flops = work("atto", 32, 8)
    model = build("atto", 32, 8).model
    assert parameters == sum(p.numel() for p in model.parameters())
    assert flops > 6 * 6 * sum(p.numel() for p in model.decoder.pixel_heads.parameters())  # at 6 of 16 patches and more


def test_the_modelled_table_has_every_size_and_engine_and_more_gpus_cost_more() -> None:
    rows = model_rows(Options(gpus=[1, 8, 64]))
    assert len(rows) == 8 * 4
    for row in rows:
        assert row["efficiency on 1"] == 1
        assert 1 > row["efficiency on 8"] > row["efficiency on 64"] > 0


@pytest.mark.drill
@pytest.mark.long
def test_two_processes_are_measured_for_real(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_data_set(tmp_path, tiles=40, size=32)
    threads = torch.get_num_threads()
    code = main([
        f"data={tmp_path}", "image_size=32", "patch_size=8", "batch=2", "workers=[1,2]", "warm=1", "steps=2", "rounds=1",
        "gpus=[8]", "extra=[model.decoder_width=8]", "save=false",
    ])  # fmt: skip
    assert code == 0
    assert torch.get_num_threads() == threads
    lines = [line.split("|") for line in capsys.readouterr().out.splitlines()]
    two = next(line for line in lines if len(line) > 2 and line[1].strip().startswith("2 x 1"))
    gradients, ring, loopback = (float(cell) for cell in two[6:9])
    assert ring == gradients > 1
    engines = {line[2].strip(): [float(cell) for cell in line[3:7]] for line in lines if line[1:2] == [" 2 x 1 "]}
    assert list(engines) == ["ddp", "zero1", "zero2", "zero3"]
    assert engines["zero3"][3] > engines["ddp"][3] >= ring  # weights travel for each pass
    assert all(rate > 0 and peak > 100 for rate, _, peak, _ in engines.values())
    assert loopback >= ring  # with the headers of its packets, and whatever else this machine sends itself
