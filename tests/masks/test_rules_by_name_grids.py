"""Masks of images and grids in other libraries as expressions of rules, each equal to its FlexAttention `mask_mod`.

The functions are evaluated for every pair of indices under `torch.vmap`, as FlexAttention evaluates them.
"""

import itertools

import pytest
import torch
from torch.nn.attention.flex_attention import create_mask

from sightline.masks import AttentionMask, document_visibility, neighborhood

Entry = tuple[str, AttentionMask, object]


def images() -> list[Entry]:
    """Vision: cross-attention to images, and sliding tile attention, whose tokens are in the order of tiles."""
    ranges = torch.tensor([[0, 7], [1, 7], [7, 12]])
    images = torch.repeat_interleave(torch.arange(3), 3)[None]
    text = torch.arange(12)[None]
    in_range = ((text[0, :, None] >= ranges[:, 0]) & (text[0, :, None] < ranges[:, 1]))[None]

    def flamingo(b, h, q, kv):
        return (q >= ranges[kv // 3, 0]) & (q < ranges[kv // 3, 1])

    def tiles(shape: tuple[int, ...], kernel: tuple[int, ...], tokens: int, text_tokens: int) -> Entry:
        """Sliding tile attention: a neighborhood of tiles, with text that attends to all and is visible to all."""
        near = neighborhood(1, shape, kernel).to_dense()[0]
        many = near.shape[0]
        table = torch.ones(many + 1, many + 1, dtype=torch.bool)
        table[:many, :many] = near
        tile_ids = torch.cat([torch.arange(many * tokens) // tokens, torch.full((text_tokens,), many)])[None]

        def close(q, kv):
            visible = torch.tensor(True)
            for size, width, step in zip(shape, kernel, strides(shape), strict=True):
                x, y = q // tokens // step % size, kv // tokens // step % size
                center = x.clamp(width // 2, size - 1 - (width - 1) // 2)
                visible = visible & (y >= center - width // 2) & (y <= center + (width - 1) // 2)
            return visible

        def mod(b, h, q, kv):
            return (q >= many * tokens) | (kv >= many * tokens) | close(q, kv)

        return f"attention-gym STA {len(shape)}-D", document_visibility(tile_ids, table[None]), mod

    return [
        ("attention-gym Flamingo cross-attention", document_visibility(text, in_range, images), flamingo),
        tiles((3, 4), (3, 2), 3, 4),
        tiles((2, 3, 3), (1, 3, 2), 2, 3),
    ]


def strides(shape: tuple[int, ...]) -> list[int]:
    """Return the distance in the row between neighbors in each dimension of a grid in row-major order."""
    return [int(torch.tensor(shape[axis + 1 :]).prod()) for axis in range(len(shape))]


def natten(shape, kernel, stride=1, dilation=1, is_causal=False):
    """Return a mask_mod of neighborhood attention: the window of a query by comparison of coordinates."""
    values = [v if isinstance(v, tuple) else (v,) * len(shape) for v in (kernel, stride, dilation, is_causal)]

    def mod(b, h, q, kv):
        visible = torch.tensor(True)
        for size, step, k, s, d, last in zip(shape, strides(shape), *values, strict=True):
            x, y = q // step % size, kv // step % size
            count = (size - x % d + d - 1) // d  # tokens of the same remainder
            visible = visible & (x % d == y % d)
            if last:
                leader = torch.minimum(x // d // s * s + s - 1, count - 1)
                visible = visible & (y <= x) & (leader - y // d < k)
            else:
                leader = torch.minimum(x // d // s * s + s // 2, count - 1)
                low = torch.minimum((leader - k // 2).clamp(min=0), count - k)
                visible = visible & (y // d >= low) & (y // d < low + k)
        return visible

    return mod


def grids() -> list[Entry]:
    cases = {
        "attention-gym NATTEN": ((4, 6), 3, 1, 1, False),
        "NATTEN 1-D": ((24,), 5, 1, 1, False),
        "NATTEN 2-D": ((6, 4), (5, 3), 1, 1, False),
        "NATTEN 3-D": ((3, 4, 2), (3, 3, 1), 1, 1, False),
        "NATTEN even": ((4, 6), (2, 4), 1, 1, False),
        "NATTEN dilated": ((7, 6), 3, 1, 2, False),
        "NATTEN causal": ((4, 6), 3, 1, 1, True),
        "NATTEN causal in time": ((3, 3, 4), (2, 3, 3), 1, 1, (True, False, False)),
        "NATTEN strided": ((6, 8), (3, 4), (3, 2), 1, False),
        "NATTEN strided, causal, dilated": ((6, 8), (3, 2), (2, 1), (2, 3), (False, True)),
    }
    names = ("stride", "dilation", "is_causal")
    return [
        (name, neighborhood(1, shape, kernel, **dict(zip(names, rest, strict=True))), natten(shape, kernel, *rest))
        for name, (shape, kernel, *rest) in cases.items()
    ]


def reordered() -> list[Entry]:
    """Grids in another order of tokens: each token is a document, so the table is Q x T."""
    near = neighborhood(1, (4, 4), 3).to_dense()
    tiled = torch.arange(16).view(2, 2, 2, 2).permute(0, 2, 1, 3).reshape(1, 16)  # tiles of 2 x 2
    by_bits = torch.tensor([[(i >> 1 & 1) * 4 + (i >> 3 & 1) * 8 + (i & 1) + (i >> 2 & 1) * 2 for i in range(16)]])
    row_major = natten((4, 4), 3)

    def entry(name: str, order: torch.Tensor) -> Entry:
        def mod(b, h, q, kv):
            return row_major(b, h, order[0, q], order[0, kv])

        return name, document_visibility(order, near), mod

    return [entry("attention-gym tiled NATTEN", tiled), entry("attention-gym Morton NATTEN", by_bits)]


ENTRIES = list(itertools.chain(images(), grids(), reordered()))


@pytest.mark.parametrize(("mask", "mask_mod"), [entry[1:] for entry in ENTRIES], ids=[entry[0] for entry in ENTRIES])
def test_expression_equals_the_mask_mod(mask: AttentionMask, mask_mod) -> None:
    _, queries, keys = mask.shape
    dense = create_mask(mask_mod, 1, 1, queries, keys, device="cpu")[0]
    assert torch.equal(mask.to_dense(), dense)
    assert dense.any()


def test_names_are_distinct() -> None:
    assert len({name for name, *_ in ENTRIES}) == len(ENTRIES)
