"""Pictures of a mask: how much of every cell is visible, where a row falls apart, and the mask as text.

All of it is counted from the intervals in O(Q K + cells); a dense Q x T mask never exists, so 64k tokens are as easy
as 64. `sightline.masks.page` makes a page to explore of the same data, `sightline.training.plots` a PNG.
"""

from __future__ import annotations

import textwrap
from dataclasses import dataclass

import torch
from torch import Tensor

from sightline.masks.blocks import block_states
from sightline.masks.mask import AttentionMask

BLOCKS_AT_ONCE = 2**22  # small blocks are counted in strips, for they may be many more than there are tokens
MOST_LINES = 64  # up to this many queries may take a line each
HALVES = " ▄▀█"  # index: 2 * (upper query sees the key) + (lower query sees it)


def visible_in_cells(mask: AttentionMask, row: int, cell: tuple[int, int]) -> Tensor:
    """Visible pairs in every cell of `cell` = (queries, keys) tokens: int64 [ceil(Q / queries), ceil(T / keys)].

    The keys from x on fill w - x % w of the cell that x lies in (cells are w keys wide) and w of each cell right of
    it. As a prefix sum along a line of cells that is two numbers in neighbouring places, w - x % w and x % w; an
    interval [start, stop) adds them for start and takes them away for stop.
    """
    tall, wide = cell
    _, queries, keys = mask.shape
    lines, columns = _ceil(queries, tall), _ceil(keys, wide)
    line = torch.arange(queries)[:, None] // tall
    steps = torch.zeros(lines, columns + 2, dtype=torch.int64)  # stop = T may write into two places past the last cell
    for end, sign in ((mask.start[row], 1), (mask.stop[row], -1)):
        end = end.cpu().long()
        place, rest = (line * (columns + 2) + end // wide).flatten(), (end % wide).flatten()
        steps.view(-1).scatter_add_(0, place, sign * (wide - rest))
        steps.view(-1).scatter_add_(0, place + 1, sign * rest)
    return steps.cumsum(1)[:, :columns]


def occupancy(mask: AttentionMask, row: int, cell: tuple[int, int]) -> Tensor:
    """Share of the pairs of every cell that is visible: float64 [ceil(Q / queries), ceil(T / keys)].

    cell: its size in (queries, keys). Cells at the lower and right edge are measured by the pairs they really have.
    """
    _, queries, keys = mask.shape
    pairs = _sizes(queries, cell[0])[:, None] * _sizes(keys, cell[1])
    return visible_in_cells(mask, row, cell).double() / pairs


def separations(mask: AttentionMask, row: int) -> list[int]:
    """Tokens before which the row falls apart: no token from there on sees one before it, nor the other way round.

    These are the document boundaries of a packed row (and the chunk boundaries under `chunked`); padding counts as
    one part. Empty where queries and keys are not the same tokens (Q != T).
    """
    _, queries, keys = mask.shape
    if queries != keys:
        return []
    start, stop = mask.start[row].cpu().long(), mask.stop[row].cpu().long()
    empty = start >= stop
    lowest = start.masked_fill(empty, keys).amin(1)  # [Q], first key that a query sees
    highest = stop.masked_fill(empty, 0).amax(1)  # [Q], end of the last key that it sees
    token = torch.arange(1, queries)
    none_looks_back = lowest.flip(0).cummin(0).values.flip(0)[1:] >= token
    none_looks_ahead = highest.cummax(0).values[:-1] <= token
    blind = empty.all(1)
    return token[none_looks_back & none_looks_ahead & ~(blind[1:] & blind[:-1])].tolist()


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
    """Full, partial and empty ones over all rows, as in FlexAttention's BlockMask: one that hangs over the edge of
    the mask is never full."""

    @property
    def pairs_per_row(self) -> float:
        return sum(self.visible_pairs) / len(self.visible_pairs)

    @property
    def sparsity(self) -> float:
        """Share of all query-key pairs that is not visible."""
        return 1 - self.pairs_per_row / (self.queries * self.keys)

    @property
    def share_of_causal(self) -> float | None:
        """Visible pairs as a share of those of plain causal attention, S (S + 1) / 2 a row; None where Q != T."""
        if self.queries != self.keys:
            return None
        return self.pairs_per_row / (self.queries * (self.queries + 1) / 2)

    def describe(self) -> str:
        """One line: shape, K, visible pairs of a row (the mean of several), and their share."""
        shape = f"S {self.queries:,}" if self.queries == self.keys else f"Q {self.queries:,}, T {self.keys:,}"
        causal = self.share_of_causal
        share = f"{1 - self.sparsity:.1%} of all" if causal is None else f"{causal:.1%} of causal"
        return f"{shape}, K {self.intervals}, {round(self.pairs_per_row):,} visible pairs ({share})"


def get_statistics(mask: AttentionMask, block_size: int = 128) -> Statistics:
    """Count the pairs and blocks of all rows."""
    if block_size < 1:
        raise ValueError(f"block_size must be at least 1 token, got {block_size}")
    batch_size, queries, keys = mask.shape
    full = partial = 0
    strip = max(1, BLOCKS_AT_ONCE // (batch_size * _ceil(keys, block_size))) * block_size
    for first in range(0, queries, strip):
        part = mask.take_queries(torch.arange(first, min(first + strip, queries), device=mask.device))
        partial_blocks, full_blocks = block_states(part.start, part.stop, keys, block_size, block_size)
        full, partial = full + int(full_blocks.sum()), partial + int(partial_blocks.sum())
    total = batch_size * _ceil(queries, block_size) * _ceil(keys, block_size)
    return Statistics(
        queries=queries,
        keys=keys,
        intervals=mask.intervals,
        visible_pairs=mask.visible_pairs().tolist(),
        block_size=block_size,
        blocks=(full, partial, total - full - partial),
    )


@dataclass(frozen=True, kw_only=True)
class _Glyphs:
    """The characters of a picture. `shades`: none of a cell visible, under 1/3, under 2/3, not all, all of it."""

    seen: str
    unseen: str
    shades: str
    corner: str
    across: str
    down: str
    split_across: str
    split_down: str


_UNICODE = _Glyphs(
    seen="██", unseen=" ·", shades=" ░▒▓█", corner="┌", across="─", down="│", split_across="┬", split_down="├"
)
_ASCII = _Glyphs(
    seen="##", unseen=" .", shades=" .+*#", corner="+", across="-", down="|", split_across="v", split_down=">"
)


def to_text(mask: AttentionMask, row: int = 0, width: int = 80, unicode: bool = True) -> str:
    """The mask as text of at most `width` columns: queries downwards, keys to the right.

    Small masks show every token: up to 32 tokens a line is a query and two columns are a key; up to what fits, half
    blocks make a column a key and a line two queries. Larger masks show by shades how much of each cell is visible.
    `unicode=False` keeps to ASCII.
    Errors: ValueError for a row the mask has not, and for a width under 24.
    """
    check_row(mask, row)
    if width < 24:
        raise ValueError(f"a picture of a mask needs a width of at least 24 columns, got {width}")
    _, queries, keys = mask.shape
    glyphs = _UNICODE if unicode else _ASCII
    numbers = max(5, len(str(queries - 1)))  # columns of the query numbers
    room = width - numbers - 2
    if 2 * max(queries, keys) <= min(MOST_LINES, room):
        columns, tall = 2.0, 1
        body = _draw_tokens(mask, row, glyphs.unseen, glyphs.seen)
        legend = "a line is a query, two columns are a key"
    elif unicode and max(queries, keys) <= room:
        columns, tall = 1.0, 2
        body = _draw_halves(mask, row)
        legend = "a line is two queries, a column is a key"
    elif max(queries, keys) <= min(MOST_LINES, room):
        columns, tall = 1.0, 1
        body = _draw_tokens(mask, row, glyphs.unseen[1], glyphs.seen[1])
        legend = "a line is a query, a column is a key"
    else:
        tall, wide = _text_cell(queries, keys, room)
        columns = 1 / wide
        body = _draw_shades(mask, row, (tall, wide), glyphs.shades)
        meanings = zip(glyphs.shades[1:], ("under 1/3", "under 2/3", "not all", "all of them"), strict=True)
        legend = f"a character is {tall:,} x {wide:,} tokens (queries x keys); visible: "
        legend += ", ".join(f"{shade} {meaning}" for shade, meaning in meanings)
    splits = separations(mask, row)
    if columns < 1 and len(splits) > len(body) / 3:  # too many to mark
        legend += f"; {len(splits) + 1:,} parts that see nothing of each other"
        splits = []
    elif splits:
        legend += f"; nothing sees across {glyphs.split_across} {glyphs.split_down}"
    left = " " * numbers
    head = [
        "query" + left[5:] + "  " + _key_numbers(keys, columns, room),
        left + " " + _ruler(keys, columns, splits, glyphs),
    ]
    gutter = _gutter(queries, tall, splits, glyphs, numbers)
    picture = head + [edge + line for edge, line in zip(gutter, body, strict=True)]
    return "\n".join([*(line.rstrip() for line in picture), *textwrap.wrap(legend, width)])


def check_row(mask: AttentionMask, row: int) -> None:
    """Errors: ValueError for a row the mask has not."""
    if not 0 <= row < mask.shape[0]:
        raise ValueError(f"row {row} is not in this mask of {mask.shape[0]} rows: choose 0 to {mask.shape[0] - 1}")


def _text_cell(queries: int, keys: int, room: int) -> tuple[int, int]:
    """Size of a character's cell: twice as many queries as keys, since a character is twice as tall as it is wide.

    A mask with far more or fewer queries than keys is stretched to between 8 and room / 2 lines.
    """
    wide = _ceil(keys, room)
    tall = min(2 * wide, _ceil(queries, 8))
    return max(tall, _ceil(2 * queries, room)), wide


def _draw_tokens(mask: AttentionMask, row: int, unseen: str, seen: str) -> list[str]:
    visible = visible_in_cells(mask, row, (1, 1)).tolist()
    return ["".join(seen if pair else unseen for pair in line) for line in visible]


def _draw_halves(mask: AttentionMask, row: int) -> list[str]:
    visible = visible_in_cells(mask, row, (1, 1))
    visible = torch.cat([visible, visible.new_zeros(visible.shape[0] % 2, visible.shape[1])])
    glyphs = 2 * visible[0::2] + visible[1::2]
    return ["".join(HALVES[glyph] for glyph in line) for line in glyphs.tolist()]


def _draw_shades(mask: AttentionMask, row: int, cell: tuple[int, int], shades: str) -> list[str]:
    share = occupancy(mask, row, cell)
    level = (share > 0).long() + (share >= 1 / 3) + (share >= 2 / 3) + (share >= 1)
    return ["".join(shades[index] for index in line) for line in level.tolist()]


def _key_numbers(keys: int, columns: float, room: int) -> str:
    """Numbers of some keys, each above its column, as far as the room goes; `columns` are those a key takes."""
    step = _step((len(str(keys)) + 3) / columns)
    line = ""
    for key in range(0, keys, step):
        line = line.ljust(int(key * columns)) + str(key)
    return line if len(line) <= room else line[: line.rindex(" ")]


def _ruler(keys: int, columns: float, splits: list[int], glyphs: _Glyphs) -> str:
    """The upper edge of the picture."""
    edge = [glyphs.across] * max(1, int(-(-keys * columns // 1)))
    for split in splits:
        edge[int(split * columns)] = glyphs.split_across
    return glyphs.corner + "".join(edge)


def _gutter(queries: int, tall: int, splits: list[int], glyphs: _Glyphs, numbers: int) -> list[str]:
    """The left edge of the picture with numbers of some queries; a line is `tall` queries."""
    step = _step(3 * tall)
    split_lines = {split // tall for split in splits}
    edge = []
    for line, first in enumerate(range(0, queries, tall)):
        number = _ceil(first, step) * step  # the first multiple of step from here on, if it is on this line
        label = str(number) if number < min(first + tall, queries) else ""
        edge.append(label.rjust(numbers) + " " + (glyphs.split_down if line in split_lines else glyphs.down))
    return edge


def _step(tokens: float) -> int:
    """The smallest power of two that is no less."""
    step = 1
    while step < tokens:
        step *= 2
    return step


def _sizes(length: int, cell: int) -> Tensor:
    """Tokens of each cell that a length is cut into; the last one may be smaller."""
    first = torch.arange(0, length, cell)
    return (length - first).clamp(max=cell)


def _ceil(length: int, cell: int) -> int:
    return -(-length // cell)
