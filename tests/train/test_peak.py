"""How much of a device's arithmetic a run uses: peaks are known or null, FLOPs are those of the model's shape."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from processes import settings
from tiny_earth import make_data_set

from mmearth_ray.experiment import build_objective, open_experiment
from mmearth_ray.model.flops import count, shape_of
from mmearth_ray.train import peak
from mmearth_ray.train.peak import PEAKS, Utilisation, measured_peak, peak_by_name, peak_of, step_flops


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "tiny"
    make_data_set(folder, tiles=8, size=40)
    return folder


@pytest.mark.parametrize(
    ("name", "fp32", "bf16"),
    [
        ("NVIDIA H200", 67e12, 989.5e12),
        ("NVIDIA H200 NVL", 60e12, 835.5e12),
        ("NVIDIA H100 80GB HBM3", 67e12, 989.5e12),
        ("NVIDIA H100 PCIe", 51e12, 756.5e12),
        ("NVIDIA A100-SXM4-40GB", 19.5e12, 312e12),
        ("NVIDIA A100 80GB PCIe", 19.5e12, 312e12),
        ("NVIDIA A10G", 35e12, 70e12),
        ("NVIDIA A10", 31.2e12, 125e12),
        ("NVIDIA L4", 30.3e12, 121e12),
        ("NVIDIA L40S", 91.6e12, 362e12),
        ("Tesla T4", 8.1e12, None),
        ("Tesla V100-SXM2-16GB", 15.7e12, None),
        ("NVIDIA GeForce RTX 4090", 82.6e12, 165.2e12),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None, None),
        ("NVIDIA GeForce RTX 3090 Ti", None, None),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", None, None),
        ("NVIDIA H200 MIG 1g.18gb", None, None),
        ("NVIDIA L40", None, None),
        ("Some GPU", None, None),
    ],
)
def test_a_gpus_peak_is_that_of_its_data_sheet_or_unknown(name: str, fp32: float | None, bf16: float | None) -> None:
    assert (peak_by_name(name, "fp32"), peak_by_name(name, "bf16")) == (fp32, bf16)


def test_tensor_cores_are_faster_than_the_others() -> None:
    assert all(rates["bf16"] >= 1.9 * rates["fp32"] for rates in PEAKS.values() if "bf16" in rates)


def test_a_given_peak_wins_and_an_unknown_device_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA L4")
    assert peak_of(torch.device("cuda"), "fp32", None) == 30.3e12
    assert peak_of(torch.device("cuda"), "fp32", 2.5) == 2.5e12
    assert peak_of(torch.device("cpu"), "fp32", 0.25) == 0.25e12
    assert peak_of(torch.device("mps"), "fp32", None) is None


def test_a_cpu_is_measured_by_its_fastest_product(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter([0.0, *(t for begin, took in ((0.0, 9.0), (20.0, 0.5), (30.0, 2.0)) for t in (begin, begin + took))])
    monkeypatch.setattr(peak.time, "perf_counter", lambda: next(now))
    monkeypatch.setattr(peak, "MEASURE_SECONDS", 25.0)
    assert measured_peak("fp32") == 2 * peak.SIDE**3 / 0.5
    monkeypatch.undo()
    assert 1e8 < measured_peak("fp32") < 1e15


def test_flops_are_those_of_the_model_that_is_built(shards: Path, tmp_path: Path) -> None:
    arguments = ("model.decoder_depth=2", "model.targets=[sentinel2,biome]", "model.bands.sentinel2=[B2,B3,B4]")
    experiment = open_experiment(settings(shards, tmp_path, *arguments), shards)
    model = build_objective(experiment).model
    assert (
        step_flops(experiment.config, experiment.spec.image_size, experiment.spec.patch_size)
        == count(shape_of(model, 32, experiment.spec.visible)).step
    )


def test_the_share_of_the_peak_weighs_steps_of_several_sizes_each_by_its_own(shards: Path, tmp_path: Path) -> None:
    experiment = open_experiment(settings(shards, tmp_path), shards)
    small, large = experiment.spec, replace(experiment.spec, image_size=64, patch_size=16)
    work = [step_flops(experiment.config, spec.image_size, spec.patch_size) for spec in (small, large)]
    assert work[1] > work[0]
    use = Utilisation(experiment, peak=1e12, workers=2)
    assert use.share([(small, 8), (large, 4), (small, 8)], 3.0) == pytest.approx(
        (16 * work[0] + 4 * work[1]) / (3.0 * 1e12 * 2)
    )
    assert Utilisation(experiment, peak=None, workers=2).share([(small, 8)], 3.0) is None
