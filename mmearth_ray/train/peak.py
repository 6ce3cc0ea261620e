"""How much of a device's arithmetic a run uses (MFU): FLOPs of the model over time, relative to what the device can do."""

import re
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from mmearth_ray.config import input_of, targets_of, visible_patches
from mmearth_ray.experiment import Experiment
from mmearth_ray.keys import Config
from mmearth_ray.model import flops
from mmearth_ray.stream.prepare import SampleSpec

PEAKS: dict[str, dict[str, float]] = {
    r"NVIDIA H200": {"fp32": 67.0, "bf16": 989.5},
    r"NVIDIA H200 NVL": {"fp32": 60.0, "bf16": 835.5},
    r"NVIDIA H100 80GB HBM3": {"fp32": 67.0, "bf16": 989.5},
    r"NVIDIA H100 NVL": {"fp32": 60.0, "bf16": 835.5},
    r"NVIDIA H100 PCIe": {"fp32": 51.0, "bf16": 756.5},
    r"NVIDIA A100(-SXM4-\d+GB|-PCIE-\d+GB| 80GB PCIe)": {"fp32": 19.5, "bf16": 312.0},
    r"NVIDIA L40S": {"fp32": 91.6, "bf16": 362.0},
    r"NVIDIA L4": {"fp32": 30.3, "bf16": 121.0},
    r"NVIDIA A10G": {"fp32": 35.0, "bf16": 70.0},
    r"NVIDIA A10": {"fp32": 31.2, "bf16": 125.0},
    r"Tesla V100-SXM2-\d+GB": {"fp32": 15.7},
    r"Tesla V100-PCIE-\d+GB": {"fp32": 14.0},
    r"Tesla T4": {"fp32": 8.1},
    r"NVIDIA GeForce RTX 4090": {"fp32": 82.6, "bf16": 165.2},
    r"NVIDIA GeForce RTX 3090": {"fp32": 35.6, "bf16": 71.0},
}
"""Peak TFLOP/s by a GPU's whole name (parts of a GPU, laptop chips and the like have other names, and none here), from NVIDIA's
data sheets: dense, so half of what a sheet gives with sparsity.  bf16: tensor cores with float32 sums; none before Ampere.
fp32: without tensor cores, for PyTorch multiplies float32 matrices in full by default.

Data sheets "H200 Tensor Core GPU" (bf16 1,979 with sparsity, fp32 67; NVL 1,671 and 60), "H100 Tensor Core GPU" (SXM 1,979 and
67, NVL 1,671 and 60, PCIe 1,513 and 51), "A100 Tensor Core GPU" (312, 19.5), "L40S" (362, 91.6), "L4 Tensor Core GPU" (242 with
sparsity, 30.3), "A10G" (70, 35), "A10" (125, 31.2), "Tesla V100" (15.7, 14), "T4" (8.1); white papers "Ada GPU Architecture"
(RTX 4090: 165.2, 82.6) and "Ampere GA102 GPU Architecture" (RTX 3090: 71, 35.6)."""

SIDE = 768
"""Side of the matrices that a CPU is measured with: they fit its caches, and a product takes about ten milliseconds."""

MEASURE_SECONDS = 0.1


def peak_of(device: torch.device, precision: str, given: float | None) -> float | None:
    """Peak FLOP/s of a device in a precision: as given in TFLOP/s, by a GPU's name, measured on a CPU; None if unknown."""
    if given is not None:
        return given * 1e12
    if device.type == "cuda":
        return peak_by_name(torch.cuda.get_device_name(device), precision)
    return measured_peak(precision) if device.type == "cpu" else None


def peak_by_name(name: str, precision: str) -> float | None:
    """What the table says of a GPU of that name in a precision, FLOP/s; None where it does not know."""
    rates = next((rates for known, rates in PEAKS.items() if re.fullmatch(known, name)), {})
    return rates[precision] * 1e12 if precision in rates else None


def measured_peak(precision: str) -> float:
    """FLOP/s of the fastest of several products of square matrices on this process's threads: what a CPU reaches, at best."""
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    matrix = torch.full((SIDE, SIDE), 1 / SIDE, dtype=dtype)
    best, deadline = float("inf"), time.perf_counter() + MEASURE_SECONDS
    for number in range(100):
        begin = time.perf_counter()
        torch.mm(matrix, matrix)
        end = time.perf_counter()
        best = min(best, end - begin)
        if number and end > deadline:
            break
    return 2 * SIDE**3 / best


@dataclass
class Utilisation:
    """The share of the devices' peak that the model's arithmetic takes; all workers' devices count as rank 0's.

    `peak`: FLOP/s of one of them, None where it is unknown.  What is computed twice or on zeros does not count.
    """

    experiment: Experiment
    peak: float | None
    workers: int
    known: dict[int, int] = field(default_factory=dict)

    def share(self, steps: Sequence[tuple[SampleSpec, int]], seconds: float) -> float | None:
        """Of steps that took so many seconds together: each by what its samples are like and how many tiles it had."""
        if self.peak is None:
            return None
        return sum(self._per_tile(spec) * tiles for spec, tiles in steps) / (seconds * self.peak * self.workers)

    def _per_tile(self, spec: SampleSpec) -> int:
        if spec.image_size not in self.known:
            self.known[spec.image_size] = step_flops(self.experiment.config, spec.image_size, spec.patch_size)
        return self.known[spec.image_size]


def step_flops(config: Config, image_size: int, patch_size: int) -> int:
    """FLOPs that the forward and the backward pass of one tile of that size take."""
    model = config.model
    shape = flops.shape(
        size=model.size, in_channels=len(input_of(config).bands), image_size=image_size, patch_size=patch_size,
        visible=visible_patches((image_size // patch_size) ** 2, model.mask_ratio), targets=targets_of(config),
        stem="original" if model.stem == "original" else "modified", decoder_width=model.decoder_width,
        decoder_depth=model.decoder_depth,
    )  # fmt: skip
    return flops.count(shape).step
