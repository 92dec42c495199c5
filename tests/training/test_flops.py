"""Peak FLOPs: by GPU name, and measured on the CPU."""

import pytest
import torch

from sightline.training.flops import find_peak


@pytest.mark.parametrize(
    ("name", "dtype", "peak"),
    [
        ("NVIDIA H200", "bfloat16", 989e12),
        ("NVIDIA GH200 480GB", "bfloat16", 989e12),
        ("NVIDIA H100 80GB HBM3", "float32", 67e12),
        ("NVIDIA H100 PCIe", "bfloat16", 756e12),
        ("NVIDIA A100-SXM4-80GB", "bfloat16", 312e12),
        ("NVIDIA B200", "bfloat16", 2250e12),
        ("NVIDIA A10G", "bfloat16", 70e12),
    ],
)
def test_known_gpus(name, dtype, peak, monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert find_peak(torch.device("cuda"), dtype).flops == peak


def test_a_cpu_is_measured_and_the_random_numbers_stay() -> None:
    before = torch.get_rng_state()
    peak = find_peak(torch.device("cpu"), "float32")
    assert 1e8 < peak.flops < 1e15
    assert "measured" in str(peak)
    assert torch.equal(torch.get_rng_state(), before)
