"""Loss curves: what a row says of given losses, under which name it is kept, and shapes that are refused."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import bench_curves
from benchmarks.bench_curves import SMOOTH, compare, main
from mmearth_ray.errors import UsageError


def curves(noise: float, difference: float) -> dict[str, np.ndarray]:
    """Three runs of a loss of 1: the optimised and the reversed one off by so much."""
    plain = np.ones(3 * SMOOTH)
    return {"plain": plain, "plain, tiles reversed": plain + noise, "optimised": plain + difference}


@pytest.mark.parametrize(("difference", "within"), [(1e-4, "yes"), (1.9e-4, "yes"), (2.5e-4, "no")])
def test_the_optimised_run_may_be_off_by_twice_the_noise(difference: float, within: str) -> None:
    row = compare(curves(1e-4, difference))
    assert row["within the noise"] == within
    assert row["median of difference / noise"] == pytest.approx(difference / 1e-4)


def test_a_row_says_what_was_measured_and_is_kept_under_its_theme(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    kept: dict[str, Any] = {}

    def write(theme: str, _: object, rows: list[dict[str, Any]]) -> Path:
        kept[theme] = rows
        return tmp_path / "kept.json"

    monkeypatch.setattr(bench_curves, "write", write)
    monkeypatch.setattr(bench_curves, "train", lambda *_: curves(1e-4, 1e-2))
    arguments = ["shape=32/8", "precision=bf16", "theme=curves_bf16"]
    assert main(arguments) == 0  # the noise of bf16 is its own
    (row,) = kept.pop("curves_bf16")
    assert not kept
    assert (row["size"], row["image/patch"], row["batch"], row["precision"]) == ("atto", "32/8", 16, "bf16")
    assert (tmp_path / "kept.png").stat().st_size > 0
    assert main(["save=false"]) == 1
    assert not kept
    assert "'precision': 'fp32'" in capsys.readouterr().out


@pytest.mark.parametrize("shape", ["56", "57/8", "56/7"])
def test_a_shape_that_cannot_be_is_refused_with_the_name_of_its_option(shape: str) -> None:
    with pytest.raises(UsageError, match=f"^shape={shape}: "):
        main([f"shape={shape}"])
