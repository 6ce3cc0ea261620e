"""The roofline: bounds by hand, peaks that are measured, and what they are measured on."""

import pytest
import torch

from benchmarks import roofline
from benchmarks.roofline import Bound, Peaks, bounds, measure_peaks, rows_of, total
from benchmarks.subject import TARGETS
from mmearth_ray.model.flops import Layer, count, layers, shape

CPU = torch.device("cpu")


def test_a_part_is_bound_by_its_work_or_by_its_bytes() -> None:
    model = [
        Layer("matrices", 10, 3, 7),
        Layer("matrices", 10, 7, 3),
        Layer("heads", 1, 3, 2),
        Layer("stem", 4, 5, 6, first=True),
    ]
    peaks = Peaks({"fp32": 100.0, "bf16": 400.0}, bandwidth=50.0)
    found = bounds(model, parameters=1000, batch=2, precision="fp32", peaks=peaks)
    flops = 3 * 2 * 2 * (10 * 3 * 7 + 10 * 7 * 3)
    weights = 4 * 7 + 8 * 3
    assert found["matrices"] == Bound(flops, 12 * weights + 2 * 2 * 4 * 100, flops / 100)
    assert found["heads"] == Bound(3 * 2 * 2 * 6, 12 * 8 + 2 * 2 * 4 * 2, (12 * 8 + 2 * 2 * 4 * 2) / 50)
    assert found["stem"].flops == 2 * 2 * 2 * 4 * 5 * 6  # no gradient of the data
    assert found["optimizer"] == Bound(0, 28000, 560)
    assert found["depthwise"] == found["decoder"] == Bound(0, 0, 0)


def test_half_the_precision_halves_what_features_take_but_not_weights() -> None:
    model, peaks = [Layer("heads", 1, 3, 2)], Peaks({"fp32": 1e9, "bf16": 1e9}, bandwidth=1.0)
    full, half = (bounds(model, 0, 5, precision, peaks)["heads"].bytes for precision in ("fp32", "bf16"))
    assert (full, half) == (12 * 8 + 2 * 5 * 4 * 2, 12 * 8 + 2 * 5 * 2 * 2)


def test_a_steps_bound_is_the_sum_of_its_parts_and_holds_all_the_work() -> None:
    work = shape(size="atto", in_channels=12, image_size=56, patch_size=8, visible=19, targets=TARGETS)
    parts = bounds(layers(work), 4_000_000, 32, "fp32", Peaks({"fp32": 1e11}, 1e10))
    whole = total(parts.values())
    assert whole.flops == 32 * count(work).step
    assert whole.seconds == sum(part.seconds for part in parts.values())
    assert whole.seconds >= max(whole.flops / 1e11, whole.bytes / 1e10)


def test_peaks_are_measured_here() -> None:
    peaks = measure_peaks(CPU, ("fp32", "bf16"), batch=1, largest=64, vector_bytes=1 << 20)
    assert list(peaks.flops) == ["fp32", "bf16"]
    assert all(rate > 1e5 for rate in [*peaks.flops.values(), peaks.bandwidth])
    assert [row["unit"] for row in rows_of(peaks)] == ["GFLOP/s", "GFLOP/s", "GB/s"]


def test_the_peak_is_the_best_of_squares_and_the_heads_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[tuple[int, ...]] = []

    def rate(dtype: torch.dtype, device: torch.device, *shape: int) -> float:
        tried.append(shape)
        return 1e12 if shape[0] == 2048 else 2e11

    monkeypatch.setattr(roofline, "_matrix_rate", rate)
    peaks = measure_peaks(CPU, ("fp32",), batch=32, vector_bytes=1 << 16)
    assert tried == [(256, 256, 256), (2048, 2048, 2048), (960, 512, 11264)]
    assert peaks.flops == {"fp32": 1e12}


def test_a_product_that_would_take_minutes_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[int] = []
    monkeypatch.setattr(roofline, "_matrix_rate", lambda dtype, device, *shape: tried.append(shape[0]) or 1e8)
    assert measure_peaks(CPU, ("bf16",), batch=32, vector_bytes=1 << 16).flops == {"bf16": 1e8}
    assert tried == [256]
