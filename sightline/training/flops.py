"""Peak FLOP/s of a device, for model FLOPs utilization (MFU)."""

from __future__ import annotations

from dataclasses import dataclass
from time import perf_counter

import torch

from sightline.layers.linear import linear

# Dense peak FLOP/s from the data sheets: (float32 without TF32, bfloat16). The first key contained in the device name
# counts, so specific names come before general ones.
GPU_PEAKS = {
    "B200": (75e12, 2250e12),
    "GH200": (67e12, 989e12),
    "H200": (67e12, 989e12),
    "H100 PCIe": (51e12, 756e12),
    "H100 NVL": (60e12, 835e12),
    "H100": (67e12, 989e12),
    "A100": (19.5e12, 312e12),
    "L40S": (91.6e12, 362e12),
    "A10G": (31.5e12, 70e12),
    "A10": (31.2e12, 125e12),
    "RTX 4090": (82.6e12, 165.2e12),
}
MEASURE_SECONDS = 0.2


@dataclass(frozen=True)
class Peak:
    """Peak FLOP/s of a device and the source of the number."""

    flops: float
    source: str

    def __str__(self) -> str:
        return f"{self.flops / 1e12:.3g} TFLOP/s ({self.source})"


def find_peak(device: torch.device, dtype: str) -> Peak:
    """Return the peak from `GPU_PEAKS`, or measure it with a short matmul on a CPU and on GPUs that are not listed."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        for known, (float32, bfloat16) in GPU_PEAKS.items():
            if known in name:
                return Peak(bfloat16 if dtype == "bfloat16" else float32, f"{known}, {dtype}, data sheet")
    return Peak(measure_peak(device), "float32 matmul, measured now")


@torch.no_grad()
def measure_peak(device: torch.device, size: int = 1024) -> float:
    """Return the best FLOP/s of several square float32 products, as layers compute them, run for about 0.2 s."""
    a, b = torch.ones(2, size, size, device=device)  # not torch.rand, which would change the random numbers of the run
    fastest, start = float("inf"), perf_counter()
    linear(a, b)  # warm-up, not timed
    while perf_counter() - start < MEASURE_SECONDS or fastest == float("inf"):
        started = perf_counter()
        linear(a, b)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        fastest = min(fastest, perf_counter() - started)
    return 2 * size**3 / fastest
