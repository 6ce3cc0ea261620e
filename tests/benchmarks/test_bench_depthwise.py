"""The benchmark of the depthwise convolution: what it measures adds up, and it needs little to run."""

import subprocess
import sys

import pytest
import torch

from benchmarks.bench_depthwise import Options, Subject, draw, in_float32, main, measure
from mmearth_ray.errors import run_command

CPU = torch.device("cpu")


def test_a_row_holds_consistent_numbers() -> None:
    options = Options(grid=3, batch=1, rounds=2, repeats=2)
    (row,) = measure(options, "atto", 2, "fp32", CPU, triton=False)
    assert (row["computation"], row["cells"], row["channels"], row["times packed"]) == ("packed", "2x2", 160, 1)
    shown = int(9 * 0.4)
    assert row["GB/s"] * row["forward and backward ms"] * 1e6 == pytest.approx(5 * 4 * shown * 2 * 2 * 160)
    assert row["output difference"] == row["gradient difference"] == 0


def test_differences_in_half_precision_are_those_of_rounding() -> None:
    (row,) = measure(Options(grid=3, batch=1, rounds=1, repeats=1), "atto", 3, "bf16", CPU, triton=False)
    assert 0 < row["output difference"] < 0.02
    assert 0 < row["gradient difference"] < 0.02


def test_float32_keeps_the_values() -> None:
    (subject,) = draw(Options(grid=3, batch=2), 1, 5, torch.bfloat16, CPU, triton=False).values()
    exact = in_float32(subject)
    assert isinstance(exact, Subject)
    for name in ("x_BVQQD", "weight_D1KK", "bias_D", "slopes_BVQQD"):
        assert getattr(exact, name).dtype == torch.float32
        assert torch.equal(getattr(exact, name).bfloat16(), getattr(subject, name))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_it_says_why_triton_is_missing(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["batch=1", "grid=2", "rounds=1", "repeats=1", "precisions=[fp32]", "save=false"]) == 0
    first, *lines = capsys.readouterr().out.splitlines()
    assert first == "triton is not measured: it needs a GPU, and PyTorch finds none here"
    assert len(lines) == 2 + 4  # head and rule of the table, four stages


def test_a_wrong_size_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(main, ["sizes=[giga]"]) == 2
    assert capsys.readouterr().err.startswith("error: sizes=['giga']: must be one of atto")


def test_it_needs_neither_ray_nor_omegaconf() -> None:
    script = "import sys; sys.modules.update(ray=None, omegaconf=None, triton=None); import benchmarks.bench_depthwise"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
