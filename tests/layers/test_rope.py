import math

import pytest
import torch
from torch import Tensor

from sightline.layers import Llama3RopeScaling, build_rotation, rope_frequencies, rotate


def turn_complex(x: Tensor, positions: Tensor, theta: float) -> Tensor:
    """The definition: channels i and i + D/2 are one complex number, turned by exp(i p theta^(-2i/D))."""
    half = x.shape[-1] // 2
    numbers = torch.complex(x[..., :half].double(), x[..., half:].double())
    angles = positions.double()[:, :, None, None] * torch.tensor([theta ** (-i / half) for i in range(half)])
    turned = numbers * torch.exp(1j * angles)
    return torch.cat([turned.real, turned.imag], dim=-1)


@pytest.mark.parametrize("head_size", [2, 8, 64])
def test_rotate_is_a_complex_product(head_size: int) -> None:
    x = torch.randn(2, 7, 3, head_size)
    positions = torch.tensor([[0, 1, 2, 0, 1, 0, 500], [9, 8, 7, 6, 5, 4, 3]], dtype=torch.int32)
    out = rotate(x, build_rotation(positions, rope_frequencies(head_size, 10_000.0)))
    torch.testing.assert_close(out.double(), turn_complex(x, positions, 10_000.0), atol=1e-4, rtol=0)


def test_scores_depend_on_the_distance_alone() -> None:
    q, k = torch.randn(2, 1, 1, 1, 16)
    frequencies = rope_frequencies(16, 10_000.0)

    def score(query_position: int, key_position: int) -> Tensor:
        at = [build_rotation(torch.tensor([[p]]), frequencies) for p in (query_position, key_position)]
        return (rotate(q, at[0]) * rotate(k, at[1])).sum()

    torch.testing.assert_close(score(12, 5), score(107, 100), atol=1e-4, rtol=0)
    assert abs(score(12, 5) - score(12, 6)) > 1e-3


def test_position_zero_changes_nothing() -> None:
    x = torch.randn(1, 1, 2, 8)
    assert torch.equal(rotate(x, build_rotation(torch.zeros(1, 1, dtype=torch.int32), rope_frequencies(8, 1e4))), x)


def test_the_backward_is_the_turn_back() -> None:
    x = torch.randn(1, 5, 2, 6, dtype=torch.float64, requires_grad=True)
    rotation = build_rotation(torch.arange(5)[None], rope_frequencies(6, 100.0))
    assert torch.autograd.gradcheck(lambda x: rotate(x, rotation), x)


def test_bfloat16_heads_are_turned_in_float32() -> None:
    x = torch.randn(1, 9, 2, 32).bfloat16()
    rotation = build_rotation(torch.arange(9)[None] * 1000, rope_frequencies(32, 500_000.0))
    out = rotate(x, rotation)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, rotate(x.float(), rotation).bfloat16())


def llama31_by_cases(frequency: float, factor: float, low: float, high: float, context: int) -> float:
    """As Meta's reference tells it: three cases by wavelength."""
    wavelength = 2 * math.pi / frequency
    if wavelength < context / high:
        return frequency
    if wavelength > context / low:
        return frequency / factor
    smooth = (context / wavelength - low) / (high - low)
    return (1 - smooth) * frequency / factor + smooth * frequency


@pytest.mark.parametrize(("factor", "head_size"), [(8.0, 128), (32.0, 64)])
def test_llama31_scaling_against_its_three_cases(factor: float, head_size: int) -> None:
    plain = rope_frequencies(head_size, 500_000.0)
    scaled = rope_frequencies(head_size, 500_000.0, Llama3RopeScaling(factor=factor))
    expected = torch.tensor([llama31_by_cases(f, factor, 1.0, 4.0, 8192) for f in plain.tolist()])
    torch.testing.assert_close(scaled, expected, atol=0, rtol=1e-6)
    kinds = [(plain == scaled).sum(), torch.isclose(plain / factor, scaled, atol=0, rtol=1e-6).sum()]
    assert all(kind > 5 for kind in kinds) and sum(kinds) < head_size // 2, "all three cases must occur"


def test_frequencies_against_literals() -> None:
    torch.testing.assert_close(rope_frequencies(8, 10_000.0), torch.tensor([1.0, 0.1, 0.01, 0.001]))


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"factor": 0.5}, "factor must be at least 1.*got 0.5"),
        ({"low_freq_factor": 4.0, "high_freq_factor": 4.0}, "low-freq-factor < high-freq-factor.*got 4.0 and 4.0"),
        ({"original_context": 0}, "original-context must be at least 1 token, got 0"),
    ],
)
def test_scaling_refuses(fields: dict, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        Llama3RopeScaling(**fields)
