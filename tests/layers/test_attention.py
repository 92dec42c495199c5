from typing import Any

import pytest
import torch
from torch import Tensor

from sightline.layers import GroupedQueryAttention, KeyValueCache, Rotation, build_rotation, rope_frequencies, rotate
from sightline.masks import AttentionMask, causal
from tests.support.lowering import lowered

HIDDEN_SIZE, NUM_HEADS, NUM_KV_HEADS, HEAD_DIM, S, EPS = 24, 6, 2, 8, 7, 1e-6
PLAIN: dict[str, Any] = {}
BIAS = {"bias": True}
SINKS = {"sinks": True}
QK_NORM = {"qk_norm_eps": EPS}
VARIANTS = [PLAIN, BIAS, SINKS, QK_NORM, {**BIAS, **SINKS, **QK_NORM}]


def make_layer(**options: Any) -> GroupedQueryAttention:
    torch.manual_seed(0)
    layer = GroupedQueryAttention(HIDDEN_SIZE, NUM_HEADS, NUM_KV_HEADS, HEAD_DIM, **options)
    layer.init_weights(0.3, 0.3)
    with torch.no_grad():
        for parameter in layer.parameters():  # biases of 0 and norms of 1 would hide missing ones
            parameter += 0.3 * torch.randn_like(parameter)
    return layer


def rotation_of(positions: Tensor) -> Rotation:
    return build_rotation(positions, rope_frequencies(HEAD_DIM, 10_000.0))


def head_by_head(layer: GroupedQueryAttention, x: Tensor, visible: Tensor, rotation: Rotation | None) -> Tensor:
    """Reference: one query head at a time, with the key head h // 3. A sink is an extra key whose value is 0."""
    state = layer.state_dict()

    def project(name: str, head: int) -> Tensor:
        rows = slice(head * HEAD_DIM, (head + 1) * HEAD_DIM)
        bias = state.get(f"{name}.bias")
        return x @ state[f"{name}.weight"][rows].t() + (0 if bias is None else bias[rows])

    def encode(name: str, head: int) -> Tensor:
        heads = project(name, head)
        if f"{name}_norm.weight" in state:
            heads = heads / (heads.square().mean(-1, keepdim=True) + EPS).sqrt() * state[f"{name}_norm.weight"]
        return heads if rotation is None else rotate(heads[:, :, None], rotation)[:, :, 0]

    outputs = []
    for h in range(NUM_HEADS):
        g = h // (NUM_HEADS // NUM_KV_HEADS)
        scores = encode("query", h) @ encode("key", g).transpose(1, 2) / HEAD_DIM**0.5
        weights = scores.masked_fill(~visible, -torch.inf).exp()
        total = weights.sum(-1, keepdim=True) + (state["sinks"][h].exp() if "sinks" in state else 0)
        outputs.append(weights / total @ project("value", g))
    return torch.cat(outputs, dim=-1) @ layer.output.weight.t() + state.get("output.bias", 0)


@pytest.mark.parametrize("options", VARIANTS, ids=lambda options: "+".join(options) or "plain")
@pytest.mark.parametrize("rotated", [True, False])
def test_equals_attention_head_by_head(options: dict[str, Any], rotated: bool) -> None:
    layer, x, mask = make_layer(**options), torch.randn(2, S, HIDDEN_SIZE), causal(2, S)
    rotation = rotation_of(torch.arange(S).expand(2, S)) if rotated else None
    expected = head_by_head(layer, x, mask.to_dense(), rotation)
    torch.testing.assert_close(layer(x, lowered(mask), rotation), expected, atol=1e-5, rtol=1e-5)


def test_all_parameters_get_gradients() -> None:
    layer, x = make_layer(**BIAS, **SINKS, **QK_NORM), torch.randn(2, S, HIDDEN_SIZE)
    layer(x, lowered(causal(2, S)), rotation_of(torch.arange(S).expand(2, S))).square().sum().backward()
    names = ["sinks", *(f"{n}.{kind}" for n in ("query", "key", "value", "output") for kind in ("weight", "bias"))]
    grads = {name: parameter.grad for name, parameter in layer.named_parameters()}
    assert sorted(grads) == sorted([*names, "query_norm.weight", "key_norm.weight"])
    assert all(grad is not None and grad.abs().max() > 1e-4 for grad in grads.values())


def test_initial_values() -> None:
    layer = GroupedQueryAttention(HIDDEN_SIZE, NUM_HEADS, NUM_KV_HEADS, HEAD_DIM, **BIAS, **SINKS, **QK_NORM)
    layer.init_weights(0.3, 0.1)
    state = layer.state_dict()
    assert all(torch.equal(w, torch.zeros_like(w)) for name, w in state.items() if "bias" in name or name == "sinks")
    assert all(torch.equal(w, torch.ones(HEAD_DIM)) for name, w in state.items() if "norm" in name)
    assert state["query.weight"].std().item() == pytest.approx(0.3, rel=0.1)
    assert state["output.weight"].std().item() == pytest.approx(0.1, rel=0.1)


@pytest.mark.parametrize("options", [PLAIN, {**BIAS, **SINKS, **QK_NORM}], ids=["plain", "all"])
def test_cached_generation_equals_full_forward(options: dict[str, Any]) -> None:
    layer, x = make_layer(**options), torch.randn(1, S, HIDDEN_SIZE)
    cache = KeyValueCache()
    full = layer(x, lowered(causal(1, S)), rotation_of(torch.arange(S)[None]))
    parts = []
    for first, last in ((0, 4), (4, 5), (5, 7)):
        new = torch.arange(first, last)
        mask = causal(1, last).take_queries(new)
        with torch.no_grad():
            parts.append(layer(x[:, first:last], lowered(mask), rotation_of(new[None]), cache))
    torch.testing.assert_close(torch.cat(parts, dim=1), full, atol=1e-5, rtol=1e-5)


def test_fully_masked_queries_return_the_bias() -> None:
    layer, x = make_layer(**BIAS, **SINKS), torch.randn(1, S, HIDDEN_SIZE)
    nothing = torch.zeros(1, S, 1, dtype=torch.int32)
    out = layer(x, lowered(AttentionMask(nothing, nothing, S)), None)
    assert torch.equal(out, layer.output.bias.expand(1, S, HIDDEN_SIZE))
