"""Attention of one query per row, against the reference backend."""

from typing import Any

import pytest
import torch
from torch import Tensor

from sightline.attention import OneQuery, attend, lower, lower_queries
from sightline.attention.exchange import LocalExchange
from sightline.masks import AttentionMask

SCALE = 0.3


def mask_of(*rows: list[tuple[int, int]], keys: int = 9) -> AttentionMask:
    """Build a mask of one query per row from its intervals."""
    width = max(map(len, rows))
    padded = torch.tensor([[*row, *[(0, 0)] * (width - len(row))] for row in rows])
    return AttentionMask.from_intervals(padded[:, None, :, 0], padded[:, None, :, 1], keys)


MASKS = {
    "all keys": mask_of([(0, 9)], [(0, 9)]),
    "unequal rows": mask_of([(0, 9)], [(4, 9)]),
    "window": mask_of([(6, 9)], [(8, 9)]),
    "two intervals": mask_of([(0, 2), (5, 9)], [(3, 4)]),
    "one key": mask_of([(0, 1)], [(0, 1)], keys=1),
}


def make_inputs(keys: int, heads: int, kv_heads: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = (2, 1, heads, 8), (2, keys, kv_heads, 8), (2, keys, kv_heads, 8)
    return [torch.randn(shape, generator=generator, dtype=dtype).transpose(1, 2) for shape in shapes]


def lowered(mask: AttentionMask, dtype: torch.dtype = torch.float64, **options: Any) -> Any:
    options = {"backend": "auto", "training": False, "segments": False, **options}
    return lower_queries(mask, device=torch.device("cpu"), dtype=dtype, exchange=LocalExchange(mask), **options)


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (6, 2), (3, 1)])
@pytest.mark.parametrize("sinks", [False, True])
def test_equals_reference(name: str, heads: int, kv_heads: int, sinks: bool) -> None:
    mask = MASKS[name]
    q, k, v = make_inputs(mask.key_length, heads, kv_heads)
    sink = torch.linspace(-1, 2, heads, dtype=torch.float64) if sinks else None
    expected = attend(q, k, v, mask, backend="reference", scale=SCALE, sinks=sink)
    inputs = lowered(mask)
    assert isinstance(inputs.backend, OneQuery)
    torch.testing.assert_close(attend(q, k, v, inputs, scale=SCALE, sinks=sink), expected, atol=1e-12, rtol=0)


def test_half_precision_with_sinks() -> None:
    mask, sink = MASKS["unequal rows"], torch.linspace(-1, 2, 4)
    q, k, v = make_inputs(9, 4, 2, torch.float32)
    expected = attend(q, k, v, mask, backend="reference", sinks=sink)
    for sinks in (sink, None):
        expected = attend(q, k, v, mask, backend="reference", sinks=sinks)
        out = attend(*(x.bfloat16() for x in (q, k, v)), lowered(mask, torch.bfloat16), sinks=sinks)
        assert out.dtype == torch.bfloat16
        torch.testing.assert_close(out.float(), expected, atol=0.03, rtol=0.03)


@pytest.mark.parametrize("sinks", [None, torch.linspace(-1, 2, 4, dtype=torch.float64)])
def test_softcap_and_values_of_another_size(sinks: Tensor | None) -> None:
    mask = MASKS["unequal rows"]
    q, k, v = make_inputs(9, 4, 2)
    v = v[..., :5]
    out = OneQuery().attend(q, k, v, lowered(mask).inputs, SCALE, sinks, 1.5)
    scores = 1.5 * torch.tanh(SCALE * q @ k.repeat_interleave(2, dim=1).mT / 1.5)
    scores = scores.masked_fill(~mask.to_dense()[:, None], -torch.inf)
    if sinks is not None:
        scores = torch.cat([scores, sinks.view(1, 4, 1, 1).expand(2, -1, -1, -1)], dim=-1)
    expected = scores.softmax(dim=-1)[..., :9] @ v.repeat_interleave(2, dim=1)
    torch.testing.assert_close(out, expected, atol=1e-12, rtol=0)


def test_other_cases_are_lowered() -> None:
    mask = MASKS["window"]
    assert isinstance(lowered(mask).backend, OneQuery)
    for options in ({"training": True}, {"backend": "reference"}, {"backend": "tiled"}):
        assert lowered(mask, **options).backend.name == options.get("backend", lower_name(mask))
    empty = mask_of([(0, 9)], [(0, 0)])
    q, k, v = make_inputs(9, 4, 2)
    out = attend(q, k, v, lowered(empty))
    assert torch.equal(out[1], torch.zeros_like(out[1])) and out[0].abs().sum() > 0
    two = AttentionMask.from_dense(torch.ones(2, 2, 9, dtype=torch.bool))
    assert not isinstance(lowered(two).backend, OneQuery)


def lower_name(mask: AttentionMask) -> str:
    return lower(mask, device="cpu", dtype=torch.float64, training=True).backend.name
