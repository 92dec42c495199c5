import torch
from torch import Tensor

from sightline.layers import GroupedQueryAttention, KeyValueCache, build_rotation, rope_frequencies, rotate
from sightline.masks import causal

WIDTH, HEADS, KV_HEADS, HEAD_SIZE, S = 24, 6, 2, 8, 7


def make_layer() -> GroupedQueryAttention:
    torch.manual_seed(0)
    layer = GroupedQueryAttention(WIDTH, HEADS, KV_HEADS, HEAD_SIZE)
    layer.init_weights(0.3, 0.3)
    return layer


def head_by_head(layer: GroupedQueryAttention, x: Tensor, visible: Tensor, positions: Tensor) -> Tensor:
    """Each query head on its own, with the key head h // 3."""
    rotation = build_rotation(positions, rope_frequencies(HEAD_SIZE, 10_000.0))
    outputs = []
    for h in range(HEADS):
        own = slice(h * HEAD_SIZE, (h + 1) * HEAD_SIZE)
        g = h // (HEADS // KV_HEADS)
        shared = slice(g * HEAD_SIZE, (g + 1) * HEAD_SIZE)
        q = rotate((x @ layer.query.weight[own].t())[:, :, None], rotation)[:, :, 0]
        k = rotate((x @ layer.key.weight[shared].t())[:, :, None], rotation)[:, :, 0]
        v = x @ layer.value.weight[shared].t()
        scores = (q @ k.transpose(1, 2) / HEAD_SIZE**0.5).masked_fill(~visible, -torch.inf)
        outputs.append(scores.softmax(dim=-1) @ v)
    return torch.cat(outputs, dim=-1) @ layer.output.weight.t()


def test_equals_attention_head_by_head() -> None:
    layer, x = make_layer(), torch.randn(2, S, WIDTH)
    positions, mask = torch.arange(S).expand(2, S), causal(2, S)
    out = layer(x, mask, build_rotation(positions, rope_frequencies(HEAD_SIZE, 10_000.0)))
    torch.testing.assert_close(out, head_by_head(layer, x, mask.to_dense(), positions), atol=1e-5, rtol=1e-5)


def test_with_a_cache_the_new_tokens_see_the_old_ones() -> None:
    layer, x = make_layer(), torch.randn(1, S, WIDTH)
    mask, cache = causal(1, S), KeyValueCache()
    rotation = build_rotation(torch.arange(S)[None], rope_frequencies(HEAD_SIZE, 10_000.0))
    whole = layer(x, mask, rotation)
    pieces = []
    for first, last in ((0, 4), (4, 5), (5, 7)):
        new = torch.arange(first, last)
        part = causal(1, last).take_queries(new)
        now = build_rotation(new[None], rope_frequencies(HEAD_SIZE, 10_000.0))
        with torch.no_grad():
            pieces.append(layer(x[:, first:last], part, now, cache))
    torch.testing.assert_close(torch.cat(pieces, dim=1), whole, atol=1e-5, rtol=1e-5)
