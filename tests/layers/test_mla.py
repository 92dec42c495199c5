import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from sightline.attention import Lowered, lower_queries
from sightline.attention.exchange import LocalExchange
from sightline.layers import KeyValueCache, MultiHeadLatentAttention, Rotation, build_rotation, rope_frequencies
from sightline.masks import AttentionMask, causal, document
from tests.support.lowering import lowered

OPTIONS: dict[str, Any] = {
    "q_lora_rank": 10,
    "kv_lora_rank": 9,
    "qk_nope_head_dim": 6,
    "qk_rope_head_dim": 4,
    "v_head_dim": 8,
}
CASES = {
    "value smaller": OPTIONS,
    "value larger": {**OPTIONS, "v_head_dim": 14},
    "queries without a latent": {**OPTIONS, "q_lora_rank": None},
    "sharpened": {**OPTIONS, "score_factor": 1.7},
}
W, H = 16, 3
IDS = torch.tensor([[0] * 5 + [1] * 7, [0] * 9 + [-1] * 3], dtype=torch.int32)
POSITIONS = torch.tensor([[*range(5), *range(7)], [*range(9), 0, 0, 0]])


def make_layer(case: str = "value smaller") -> MultiHeadLatentAttention:
    torch.manual_seed(0)
    layer = MultiHeadLatentAttention(W, H, **CASES[case])
    layer.init_weights(0.4, 0.4)
    for parameter in layer.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    return layer.double()


def mask_and_rotation() -> tuple[Lowered, Rotation]:
    mask = lowered(causal(2, 12) & document(IDS), torch.float64)
    return mask, build_rotation(POSITIONS, rope_frequencies(4, 100.0))


def reference(layer: MultiHeadLatentAttention, x: Tensor, positions: Tensor) -> Tensor:
    """One document [n, W], one head at a time, by equations 37 to 47 of arXiv 2405.04434."""

    def norm(x: Tensor, weight: Tensor) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight

    def rotated(x: Tensor) -> Tensor:
        angles = positions[:, None].double() * torch.tensor([1.0, 0.1], dtype=torch.float64)
        z = torch.complex(x[:, :2], x[:, 2:]) * torch.exp(1j * angles)
        return torch.cat([z.real, z.imag], dim=1)

    q_latent = x if layer.query_down is None else norm(x @ layer.query_down.weight.t(), layer.query_norm.weight)
    down = x @ layer.kv_down.weight.t()
    latent, shared_key = norm(down[:, :9], layer.kv_norm.weight), rotated(down[:, 9:])
    outs, size = [], 6 + layer.v_head_dim
    for head in range(H):
        q = q_latent @ layer.query.weight[head * 10 : head * 10 + 10].t()
        kv = latent @ layer.kv.weight[head * size : head * size + size].t()
        scores = (q[:, :6] @ kv[:, :6].t() + rotated(q[:, 6:]) @ shared_key.t()) * layer.scale
        scores = scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(1), -torch.inf)
        outs.append(scores.softmax(-1) @ kv[:, 6:])
    return torch.cat(outs, dim=1) @ layer.output.weight.t()


@pytest.mark.parametrize("case", CASES)
def test_packed_equals_reference_per_document(case: str) -> None:
    layer, x = make_layer(case), torch.randn(2, 12, W, dtype=torch.float64)
    out = layer(x, *mask_and_rotation())
    assert layer.scale == pytest.approx((1.7 if case == "sharpened" else 1.0) / math.sqrt(10))
    for row, start, end in ((0, 0, 5), (0, 5, 12), (1, 0, 9)):
        expected = reference(layer, x[row, start:end], POSITIONS[row, start:end])
        assert_close(out[row, start:end], expected, atol=1e-6, rtol=0)  # angles are float32
    assert torch.equal(out[1, 9:], torch.zeros(3, W, dtype=torch.float64))


def test_gradients_equal_reference() -> None:
    layer, x = make_layer(), torch.randn(2, 12, W, dtype=torch.float64, requires_grad=True)
    leaves, grad = [x, *layer.parameters()], torch.randn(5, W, dtype=torch.float64)
    outs = layer(x, *mask_and_rotation())[0, :5], reference(layer, x[0, :5], POSITIONS[0, :5])
    for actual, expected in zip(*(torch.autograd.grad(out, leaves, grad) for out in outs), strict=True):
        assert_close(actual, expected, atol=1e-6, rtol=1e-6)
        assert expected.abs().sum() > 0


def test_cache_holds_latent_and_shared_key_only() -> None:
    layer, x = make_layer(), torch.randn(1, 12, W, dtype=torch.float64)
    frequencies, mask = rope_frequencies(4, 100.0), causal(1, 12)
    full = layer(x, lowered(mask, torch.float64), build_rotation(torch.arange(12)[None], frequencies))
    cache, start = KeyValueCache(), 0
    for end in (5, 6, 12):
        new = torch.arange(start, end)
        part = AttentionMask(mask.start[:, new], mask.stop[:, new], end)
        out = layer(x[:, new], lowered(part, torch.float64), build_rotation(new[None], frequencies), cache)
        assert_close(out, full[:, new])
        start = end
    (joint,) = cache.append(torch.zeros(1, 1, 1, 13))
    assert joint.shape == (1, 1, 13, 13), "9 + 4 values per token, for all heads"


def test_initial_spread() -> None:
    """Weights that read a latent have std fan_in^-0.5; weights that read hidden states have the given std."""
    torch.manual_seed(0)
    layer = MultiHeadLatentAttention(
        64, 8, q_lora_rank=400, kv_lora_rank=100, qk_nope_head_dim=24, qk_rope_head_dim=8, v_head_dim=32
    )
    layer.init_weights(0.5, 0.25)
    expected = {"query_down": 0.5, "query": 1 / 20, "kv_down": 0.5, "kv": 1 / 10, "output": 0.25}
    assert {name: getattr(layer, name).weight.std().item() for name in expected} == pytest.approx(expected, rel=0.05)
    direct = MultiHeadLatentAttention(
        64, 8, q_lora_rank=None, kv_lora_rank=100, qk_nope_head_dim=24, qk_rope_head_dim=8, v_head_dim=32
    )
    direct.init_weights(0.5, 0.25)
    assert direct.query.weight.std().item() == pytest.approx(0.5, rel=0.05)


def test_latents_attended_to_directly_equal_expanded_keys_and_values() -> None:
    """One token per row after a cache of unequal rows: without gradients through the latents, else expanded."""
    layer, frequencies = make_layer(), rope_frequencies(4, 100.0)
    x, start = torch.randn(2, 12, W, dtype=torch.float64), torch.tensor([[[0]], [[5]]], dtype=torch.int32)
    mask = AttentionMask(start, torch.full_like(start, 12), 12)
    outs = {}
    for backend in ("auto", "reference"):
        cache, prompt = KeyValueCache(), causal(2, 11)
        options = {"device": torch.device("cpu"), "dtype": torch.float64, "training": False, "segments": False}
        with torch.no_grad():
            layer(x[:, :11], lowered(prompt, torch.float64), build_rotation(torch.arange(11)[None], frequencies), cache)
            one = lower_queries(mask, backend=backend, exchange=LocalExchange(mask), **options)
            outs[one.backend.name] = layer(x[:, 11:], one, build_rotation(torch.tensor([[11]]), frequencies), cache)
    assert set(outs) == {"one query", "reference"}
    torch.testing.assert_close(outs["one query"], outs["reference"], atol=1e-12, rtol=0)
