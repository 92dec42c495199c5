import math

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from sightline.layers import Llama3RopeScaling, YarnScaling, build_rotation, rope_frequencies, rotate


def rotate_complex(x: Tensor, positions: Tensor, theta: float) -> Tensor:
    """Definition of RoPE: channels i and i + D/2 are one complex number, multiplied by exp(i p theta^(-2i/D))."""
    half = x.shape[-1] // 2
    numbers = torch.complex(x[..., :half].double(), x[..., half:].double())
    angles = positions.double()[:, :, None, None] * torch.tensor([theta ** (-i / half) for i in range(half)])
    rotated = numbers * torch.exp(1j * angles)
    return torch.cat([rotated.real, rotated.imag], dim=-1)


@pytest.mark.parametrize("head_dim", [2, 8, 64])
def test_rotate_equals_complex_product(head_dim: int) -> None:
    x = torch.randn(2, 7, 3, head_dim)
    positions = torch.tensor([[0, 1, 2, 0, 1, 0, 500], [9, 8, 7, 6, 5, 4, 3]], dtype=torch.int32)
    out = rotate(x, build_rotation(positions, rope_frequencies(head_dim, 10_000.0)))
    torch.testing.assert_close(out.double(), rotate_complex(x, positions, 10_000.0), atol=1e-4, rtol=0)


def test_scores_depend_only_on_distance() -> None:
    q, k = torch.randn(2, 1, 1, 1, 16)
    frequencies = rope_frequencies(16, 10_000.0)

    def score(query_position: int, key_position: int) -> Tensor:
        rotations = [build_rotation(torch.tensor([[p]]), frequencies) for p in (query_position, key_position)]
        return (rotate(q, rotations[0]) * rotate(k, rotations[1])).sum()

    torch.testing.assert_close(score(12, 5), score(107, 100), atol=1e-4, rtol=0)
    assert abs(score(12, 5) - score(12, 6)) > 1e-3


def test_position_zero_is_identity() -> None:
    x = torch.randn(1, 1, 2, 8)
    assert torch.equal(rotate(x, build_rotation(torch.zeros(1, 1, dtype=torch.int32), rope_frequencies(8, 1e4))), x)


def test_rotate_gradcheck() -> None:
    x = torch.randn(1, 5, 2, 6, dtype=torch.float64, requires_grad=True)
    rotation = build_rotation(torch.arange(5)[None], rope_frequencies(6, 100.0))
    assert torch.autograd.gradcheck(lambda x: rotate(x, rotation), x)


def test_bfloat16_is_rotated_in_float32() -> None:
    x = torch.randn(1, 9, 2, 32).bfloat16()
    rotation = build_rotation(torch.arange(9)[None] * 1000, rope_frequencies(32, 500_000.0))
    out = rotate(x, rotation)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, rotate(x.float(), rotation).bfloat16())


def llama31_by_cases(frequency: float, factor: float, low: float, high: float, context: int) -> float:
    """Meta's reference implementation: three cases by wavelength."""
    wavelength = 2 * math.pi / frequency
    if wavelength < context / high:
        return frequency
    if wavelength > context / low:
        return frequency / factor
    smooth = (context / wavelength - low) / (high - low)
    return (1 - smooth) * frequency / factor + smooth * frequency


@pytest.mark.parametrize(("factor", "head_dim"), [(8.0, 128), (32.0, 64)])
def test_llama31_scaling_equals_reference(factor: float, head_dim: int) -> None:
    unscaled = rope_frequencies(head_dim, 500_000.0)
    scaled = rope_frequencies(head_dim, 500_000.0, Llama3RopeScaling(factor=factor))
    expected = torch.tensor([llama31_by_cases(f, factor, 1.0, 4.0, 8192) for f in unscaled.tolist()])
    torch.testing.assert_close(scaled, expected, atol=0, rtol=1e-6)
    kinds = [(unscaled == scaled).sum(), torch.isclose(unscaled / factor, scaled, atol=0, rtol=1e-6).sum()]
    assert all(kind > 5 for kind in kinds) and sum(kinds) < head_dim // 2, "all three cases must occur"


DEEPSEEK_V3 = {"factor": 40, "mscale": 1.0, "mscale_all_dim": 1.0, "beta_fast": 32, "beta_slow": 1}
GPT_OSS = {"factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False}
DEEPSEEK_V2 = {"factor": 40, "mscale": 0.707, "mscale_all_dim": 0.5}


@pytest.mark.parametrize(
    ("head_dim", "theta", "fields", "rotation_factor"),
    [
        (64, 10_000.0, DEEPSEEK_V3, 1.0),
        (64, 150_000.0, GPT_OSS, 1 + 0.1 * math.log(32)),
        (64, 10_000.0, DEEPSEEK_V2, (1 + 0.0707 * math.log(40)) / (1 + 0.05 * math.log(40))),
        (8, 100.0, {"factor": 4.0, "beta_fast": 300.0}, 1 + 0.1 * math.log(4)),  # the ramp is clipped at both ends
    ],
)
def test_yarn_against_transformers(head_dim: int, theta: float, fields: dict, rotation_factor: float) -> None:
    rope = {"rope_type": "yarn", "rope_theta": theta, "original_max_position_embeddings": 4096, **fields}
    config = PreTrainedConfig(rope_parameters=rope, head_dim=head_dim, max_position_embeddings=4096)
    config.hidden_size, config.num_attention_heads = head_dim, 1
    expected, expected_factor = ROPE_INIT_FUNCTIONS["yarn"](config)
    scaling = YarnScaling(original_context=4096, **fields)
    torch.testing.assert_close(rope_frequencies(head_dim, theta, scaling), expected, atol=0, rtol=1e-6)
    assert scaling.rotation_factor == pytest.approx(expected_factor) == pytest.approx(rotation_factor)


def test_yarn_ramp_literal() -> None:
    """Over 4096 tokens with theta 10000 the ramp goes from pair 10 (floor of 10.47) to pair 23 (ceil of 22.51)."""
    ratio = rope_frequencies(64, 10_000.0, YarnScaling(factor=4.0)) / rope_frequencies(64, 10_000.0)
    expected = [1.0] * 10 + [1 - 0.75 * step / 13 for step in range(13)] + [0.25] * 9
    torch.testing.assert_close(ratio, torch.tensor(expected))


def test_yarn_score_and_rotation_factors() -> None:
    scaling = YarnScaling(factor=40.0, mscale=0.5, mscale_all_dim=1.0)
    assert scaling.score_factor == pytest.approx((1 + 0.1 * math.log(40)) ** 2)
    x = torch.randn(1, 3, 1, 8, dtype=torch.float64, requires_grad=True)
    rotation = build_rotation(torch.arange(3)[None], rope_frequencies(8, 100.0, scaling), scaling.rotation_factor)
    scale = rotate(x, rotation).norm() / x.norm()
    assert scale.item() == pytest.approx((1 + 0.05 * math.log(40)) / (1 + 0.1 * math.log(40)))
    assert torch.autograd.gradcheck(lambda x: rotate(x, rotation), x)


def test_frequencies_literal() -> None:
    torch.testing.assert_close(rope_frequencies(8, 10_000.0), torch.tensor([1.0, 0.1, 0.01, 0.001]))


def test_llama3_scaling_with_equal_factors_is_a_step() -> None:
    """Llama 4 Scout: frequencies below one rotation over the original context are scaled, all others are kept."""
    unscaled = rope_frequencies(64, 500_000.0)
    scaling = Llama3RopeScaling(factor=16.0, low_freq_factor=1.0, high_freq_factor=1.0)
    low = unscaled * 8192 / (2 * math.pi) < 1
    assert 0 < low.sum() < 32
    torch.testing.assert_close(rope_frequencies(64, 500_000.0, scaling), torch.where(low, unscaled / 16, unscaled))


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"factor": 0.5}, "factor must be at least 1.*got 0.5"),
        ({"low_freq_factor": 5.0, "high_freq_factor": 4.0}, "low-freq-factor <= high-freq-factor.*got 5.0 and 4.0"),
        ({"original_context": 0}, "original-context must be at least 1 token, got 0"),
    ],
)
def test_invalid_llama3_scaling(fields: dict, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        Llama3RopeScaling(**fields)


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"factor": 0.5}, "factor must be at least 1.*got 0.5"),
        ({"beta_slow": 32.0}, "0 < beta-slow < beta-fast.*got 32.0 and 32.0"),
        ({"original_context": 0}, "original-context must be at least 1 token, got 0"),
    ],
)
def test_invalid_yarn_scaling(fields: dict, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        YarnScaling(**fields)
