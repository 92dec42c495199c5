"""Pictures of a mask: how much of every cell is visible, which blocks are full, and the mask as text.

All of it is counted from the intervals in O(Q K + cells); a dense Q x T mask never exists, so 64k tokens are as easy
as 64. `sightline.masks.page` makes the same numbers into a page to explore, `sightline.training.plots` into a PNG.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sightline.masks.mask import AttentionMask

EMPTY, PARTIAL, FULL = 0, 1, 2  # states of a block


def visible_in_cells(mask: AttentionMask, row: int, cell: tuple[int, int]) -> Tensor:
    """Visible pairs in every cell of `cell` = (queries, keys) tokens: int64 [ceil(Q / queries), ceil(T / keys)].

    The keys from x on fill w - x % w of the cell that x lies in (cells are w keys wide) and w of each cell right of
    it. As a prefix sum along a line of cells that is two numbers, w - x % w and x % w, in neighbouring places; an
    interval [start, stop) adds them for start and takes them away for stop.
    """
    tall, wide = cell
    _, queries, keys = mask.shape
    lines, columns = _ceil(queries, tall), _ceil(keys, wide)
    line = torch.arange(queries)[:, None] // tall
    steps = torch.zeros(lines, columns + 2, dtype=torch.int64)  # stop = T may write two places past the last cell
    for end, sign in ((mask.start[row], 1), (mask.stop[row], -1)):
        column, rest = end.cpu().long() // wide, end.cpu().long() % wide
        place = line * (columns + 2) + column
        steps.view(-1).scatter_add_(0, place.flatten(), (sign * (wide - rest)).flatten())
        steps.view(-1).scatter_add_(0, place.flatten() + 1, (sign * rest).flatten())
    return steps.cumsum(1)[:, :columns]


def occupancy(mask: AttentionMask, row: int, cell: tuple[int, int]) -> Tensor:
    """Share of the pairs of every cell that is visible: float64 [ceil(Q / queries), ceil(T / keys)].

    Cells at the lower and right edge are measured by the pairs that they really have.
    """
    _, queries, keys = mask.shape
    pairs = _sizes(queries, cell[0])[:, None] * _sizes(keys, cell[1])
    return visible_in_cells(mask, row, cell).double() / pairs


def block_states(mask: AttentionMask, row: int, block_size: int) -> Tensor:
    """EMPTY, PARTIAL or FULL of every block: uint8 [ceil(Q / block_size), ceil(T / block_size)].

    As in FlexAttention's BlockMask, a block that hangs over the edge of the mask is never full.
    """
    if block_size < 1:
        raise ValueError(f"block_size must be at least 1 token, got {block_size}")
    visible = visible_in_cells(mask, row, (block_size, block_size))
    return (visible > 0).to(torch.uint8) + (visible == block_size**2).to(torch.uint8)


def separations(mask: AttentionMask, row: int) -> list[int]:
    """Tokens before which the row falls apart: none from there on sees one before it, nor the other way round.

    These are the document boundaries of a packed row (and its chunk boundaries under `chunked`). Padding counts as
    one part. Empty where queries and keys are not the same tokens (Q != T).
    """
    _, queries, keys = mask.shape
    if queries != keys:
        return []
    start, stop = mask.start[row].cpu().long(), mask.stop[row].cpu().long()
    blind = start >= stop
    lowest = start.masked_fill(blind, keys).amin(1)  # [Q], first key that a query sees
    highest = stop.masked_fill(blind, 0).amax(1)  # [Q], end of the last key that it sees
    token = torch.arange(1, queries)
    from_here = lowest.flip(0).cummin(0).values.flip(0)[1:] >= token
    before = highest.cummax(0).values[:-1] <= token
    padding = blind.all(1)
    return token[from_here & before & ~(padding[1:] & padding[:-1])].tolist()


@dataclass(frozen=True, kw_only=True)
class Statistics:
    """What a mask amounts to, over all of its rows."""

    queries: int
    keys: int
    intervals: int
    """K, the most intervals a query has."""
    visible_pairs: list[int]
    """Of each row."""
    block_size: int
    blocks: tuple[int, int, int]
    """Empty, partial and full ones, over all rows."""

    @property
    def sparsity(self) -> float:
        """Share of all query-key pairs that is not visible."""
        return 1 - sum(self.visible_pairs) / (len(self.visible_pairs) * self.queries * self.keys)

    @property
    def share_of_causal(self) -> float | None:
        """Visible pairs as a share of plain causal attention's, S (S + 1) / 2 a row; None where Q != T."""
        if self.queries != self.keys:
            return None
        return sum(self.visible_pairs) / (len(self.visible_pairs) * self.queries * (self.queries + 1) / 2)

    def describe(self) -> str:
        """One line: shape, K, visible pairs of a row (the mean of several), share of causal or of all pairs."""
        shape = f"S {self.queries:,}" if self.queries == self.keys else f"Q {self.queries:,}  T {self.keys:,}"
        pairs = round(sum(self.visible_pairs) / len(self.visible_pairs))
        if self.share_of_causal is None:
            share = f"{1 - self.sparsity:.1%} of all"
        else:
            share = f"{self.share_of_causal:.1%} of causal"
        return f"{shape}  K {self.intervals}  {pairs:,} visible pairs, {share}"


def get_statistics(mask: AttentionMask, block_size: int = 128) -> Statistics:
    """Count the mask's pairs and blocks, over all rows."""
    batch_size, queries, keys = mask.shape
    counts = torch.zeros(3, dtype=torch.int64)
    strip = max(1, 2**22 // _ceil(keys, block_size)) * block_size  # so that a small block size fits in memory too
    for first in range(0, queries, strip):
        part = mask.take_queries(torch.arange(first, min(first + strip, queries), device=mask.device))
        for row in range(batch_size):
            counts += torch.bincount(block_states(part, row, block_size).flatten(), minlength=3)
    return Statistics(
        queries=queries,
        keys=keys,
        intervals=mask.start.shape[2],
        visible_pairs=mask.visible_pairs().tolist(),
        block_size=block_size,
        blocks=(int(counts[EMPTY]), int(counts[PARTIAL]), int(counts[FULL])),
    )


@dataclass(frozen=True, kw_only=True)
class _Glyphs:
    """The characters of a picture."""

    seen: str
    unseen: str
    shades: str
    """Share of a cell that is visible: none, under 1/3, under 2/3, under 1, all."""
    corner: str
    across: str
    down: str
    split_across: str
    split_down: str


UNICODE = _Glyphs(
    seen="██", unseen=" ·", shades=" ░▒▓█", corner="┌", across="─", down="│", split_across="┬", split_down="├"
)
ASCII = _Glyphs(
    seen="# ", unseen=". ", shades=" .+*#", corner="+", across="-", down="|", split_across="v", split_down=">"
)
HALVES = " ▄▀█"  # 2 * (upper token visible) + (lower token visible)
MOST_SINGLE_TOKENS = 64  # up to here a token is a cell, wherever the width allows it


def to_text(mask: AttentionMask, row: int = 0, width: int = 80, unicode: bool = True) -> str:
    """The mask as text of at most `width` columns: queries downwards, keys to the right.

    Small masks show every token: two columns a key and a line a query where that fits, else half blocks (a column a
    key, two queries a line). Larger ones show the visible share of cells, by shades. `unicode=False` is plain ASCII.
    Errors: ValueError for a row the mask has not, and for a width under 24.
    """
    _check_row(mask, row)
    if width < 24:
        raise ValueError(f"width must be at least 24 columns to draw a mask, got {width}")
    _, queries, keys = mask.shape
    glyphs = UNICODE if unicode else ASCII
    numbers = len(str(queries - 1))
    room = width - numbers - 2
    tall, wide = _cell_of_text(queries, keys, room)
    small = max(queries, keys) <= MOST_SINGLE_TOKENS
    if small and 2 * keys <= room:
        body = _draw_tokens(mask, row, (glyphs.unseen, glyphs.seen))
        tall, columns_per_key, legend = 1, 2.0, "one token a cell"
    elif unicode and wide == 1 and tall <= 2:
        body = _draw_halves(mask, row)
        tall, columns_per_key, legend = 2, 1.0, "one column a key, two queries a line"
    elif small and keys <= room:
        body = _draw_tokens(mask, row, (glyphs.unseen[0], glyphs.seen[0]))
        tall, columns_per_key, legend = 1, 1.0, "one token a cell"
    else:
        body = _draw_shades(mask, row, (tall, wide), glyphs.shades)
        some = glyphs.shades
        legend = f"one character is {wide} keys x {tall} queries: {some[1]} under 1/3 visible, {some[2]} under 2/3, "
        legend += f"{some[3]} under all, {some[4]} all"
        columns_per_key = 1 / wide
    splits = separations(mask, row)
    ruler = _ruler(keys, columns_per_key, splits, glyphs)
    gutter = _gutter(queries, tall, splits, glyphs, numbers)
    if glyphs.split_across in ruler:
        legend += f"; {glyphs.split_across} {glyphs.split_down} nothing sees across"
    lines = [" " * (numbers + 2) + _key_numbers(keys, columns_per_key), " " * (numbers + 1) + ruler]
    lines += [left + line for left, line in zip(gutter, body, strict=True)]
    return "\n".join(line.rstrip() for line in [*lines, *_wrap(legend, width)])
