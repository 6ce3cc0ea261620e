"""The benchmark of a step: a tiny real measurement, on a machine without the heavy packages, too; and what it refuses."""

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import bench_step
from benchmarks.bench_step import Options, main, measure
from benchmarks.computations import make_subject, our_step, plain_step
from benchmarks.largest import enlarge, largest
from benchmarks.memory import Options as MemoryOptions
from benchmarks.memory import in_fresh_process
from benchmarks.roofline import Peaks
from benchmarks.timing import Stopwatch
from mmearth_ray.errors import DataError, UsageError, run_command
from mmearth_ray.model.flops import count, shape_of

CPU = torch.device("cpu")
PEAKS = Peaks({"fp32": 1e11, "bf16": 2e11}, 1e10)
PARTS = ["reading", "stem", "stage 1", "stage 2", "stage 3", "stage 4", "decoder block", "heads and losses", "optimizer"]
ABSENT = ("ray", "deepspeed", "omegaconf", "yaml", "h5py", "safetensors", "matplotlib", "psutil")
BLOCKER = f'''
import sys

class Absent:
    """Finds no package of those that a bare machine lacks."""

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {ABSENT}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Absent())
'''
TINY = ["sizes=[atto]", "shapes=[16/8]", "batch=[2]", "rounds=1", "peak_rows=32", "peak_megabytes=1", "save=false"]

on_cpu = pytest.mark.skipif(torch.cuda.is_available(), reason="tests what happens without a GPU")


@pytest.fixture(scope="module")
def tables() -> dict[str, list]:
    options = Options(rounds=1, backends=["packed", "triton"], batch=[2], memory=False)
    return measure(options, "atto", "16/8", CPU, PEAKS)


def test_every_computation_has_a_row(tables: dict[str, list]) -> None:
    rows = {(row["computation"], row["precision"]): row for row in tables["steps"]}
    assert {("packed", "fp32"), ("plain", "fp32")} <= rows.keys()
    assert rows["plain", "fp32"]["times plain"] == 1
    for (name, precision), row in rows.items():
        assert (row["size"], row["image/patch"], row["batch"]) == ("atto", "16/8", 2)
        assert (row["times masked-dense"] is None) == (name == "plain")
        assert all(math.isfinite(value) and value > 0 for value in row.values() if isinstance(value, float))
        assert row["GFLOP/s"] == pytest.approx(row["GFLOP per tile"] * row["tiles/s"])
        assert row["MFU"] == pytest.approx(row["GFLOP/s"] * 1e9 / PEAKS.flops[precision])
        assert row["MFU"] < row["share of the roofline"] * 1.000001
        assert 1e3 * 2 / row["tiles/s"] == pytest.approx(row["forward ms"] + row["backward ms"] + row["optimizer ms"])


def test_precision_is_that_of_the_row_and_memory_is_measured_beside() -> None:
    options = Options(rounds=1, precisions=["bf16"], batch=[2], against=[], parts=False)
    (row,) = measure(options, "atto", "16/8", CPU, PEAKS)["steps"]
    assert (row["computation"], row["precision"], row["times plain"]) == ("packed", "bf16", None)
    assert row["MFU"] == pytest.approx(row["GFLOP/s"] * 1e9 / PEAKS.flops["bf16"])
    assert row["peak MiB"] > 40  # at least weights, gradients and moments of 3.4 million parameters and more


def test_work_is_counted_once_for_every_computation(tables: dict[str, list]) -> None:
    subject = make_subject("atto", 16, 8, 2, CPU)
    flops = count(shape_of(subject.objective.model, 16, 1)).step
    assert {row["GFLOP per tile"] for row in tables["steps"]} == {flops / 1e9}


def test_parts_and_operators_of_our_steps_are_listed(tables: dict[str, list]) -> None:
    for row in tables["parts, ms"]:
        assert list(row)[5:] == PARTS
        assert all(row[part] > 0 for part in PARTS)
    assert sum(row["share"] for row in tables["operators"] if row["precision"] == "fp32") <= 1.000001
    assert any(row["operator"].endswith("mm") for row in tables["operators"])


@on_cpu
def test_a_backend_that_cannot_run_here_is_left_out_with_the_reason(tables: dict[str, list]) -> None:
    reasons = [row["reason"] for row in tables["not measured"] if row["computation"] == "triton"]
    assert len(reasons) == 2  # the step and the encoder
    assert all("GPU" in reason for reason in reasons)
    assert not any(row["computation"] == "triton" for row in tables["steps"])


def test_it_runs_where_there_is_only_pytorch_numpy_and_arrow(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(BLOCKER)
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "OMP_NUM_THREADS": "1"}
    root = Path(bench_step.__file__).parents[1]
    for absent in ABSENT[:3]:
        command = [sys.executable, "-c", f"import {absent}"]
        assert subprocess.run(command, env=environment, capture_output=True, check=False).returncode == 1
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.bench_step", *TINY, "against=[plain]", "parts=false"],
        env=environment, cwd=root, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if line.startswith("| atto | 16/8 | 2 |")]
    assert [line.split(" | ")[3] for line in lines] == ["packed", "plain"]
    head = next(line for line in done.stdout.splitlines() if "memory of plain" in line)
    place = head.split(" | ").index("memory of plain")
    assert float(lines[0].split(" | ")[place]) > 0
    assert float(lines[1].split(" | ")[place]) == 1


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("shapes=[56-8]", "shapes=56-8: must be IMAGE/PATCH in pixels, such as 112/16"),
        ("shapes=[60/8]", "shapes=60/8: image sides must be multiples of the patch size 8; got 60"),
        ("shapes=[56/7]", "shapes=56/7: a patch must be 8, 16, 32 pixels wide; got 7"),
        ("batch=[1,2]", "batch=[1, 2]: give one number, or one for each of 1 sizes"),
        ("backends=[cuda]", "backends=['cuda']: must be one of packed, "),
        pytest.param("largest=true", "largest=true needs a GPU, and PyTorch sees none", marks=on_cpu),
    ],
)
def test_what_cannot_be_measured_is_refused(argument: str, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        main([*TINY[:1], argument])
    assert str(caught.value).startswith(message)


def test_help_lists_the_keys(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(main, ["--help"]) == 0
    assert "tiles per step: one number, or one per size" in capsys.readouterr().out


def test_memory_that_cannot_be_measured_is_told_with_the_reason() -> None:
    with pytest.raises(DataError, match=r"^memory was not measured: error: size=none: must be one of atto, "):
        in_fresh_process(MemoryOptions(size="none", batch=1))


@pytest.mark.parametrize("limit", [3, 4, 5, 8, 100, 1000, 1025])
def test_the_largest_that_fits_is_found_to_a_sixteenth(limit: int) -> None:
    tried: list[int] = []
    found = largest(lambda n: tried.append(n) or n <= limit, 4)
    assert found == 0 if limit < 4 else limit * 15 / 16 - 1 <= found <= limit
    assert len(tried) < 20


def test_an_enlarged_subject_repeats_its_tiles() -> None:
    subject = make_subject("atto", 16, 8, 2, CPU)
    larger = enlarge(subject, 5)
    assert larger.tiles == 5
    for name, values in larger.batch.items():
        assert torch.equal(values[4].float(), subject.batch[name][0].float())
    assert torch.equal(enlarge(subject, 4).totals, larger.objective.valid_counts(enlarge(subject, 4).batch).sum(0))


def test_a_step_has_three_laps_moves_the_weights_and_clears_the_gradients() -> None:
    subject = make_subject("atto", 16, 8, 2, CPU)
    weight = subject.objective.model.decoder.projection.weight
    before = weight.detach().clone()
    for work, moved in ((plain_step(subject), False), (our_step(subject, "packed", "fp32"), True)):
        watch = Stopwatch(CPU)
        work(watch)
        assert watch.names == ["forward", "backward", "optimizer"]
        assert weight.grad is None
        assert torch.equal(weight, before) != moved  # the plain computation has copies of its own
