"""A mask as text for the terminal."""

from __future__ import annotations

import textwrap
from dataclasses import dataclass

import torch

from sightline.masks import AttentionMask
from sightline.masks.statistics import check_row, occupancy, separations, visible_in_cells
from sightline.plots.palette import tick_step

MOST_LINES = 64  # up to this many queries may take a line each
HALVES = " ▄▀█"  # index: 2 * (upper query sees the key) + (lower query sees it)


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

    Small masks show every token, up to what fits with half blocks; larger ones show by shades how much of each cell is
    visible. `unicode=False` keeps to ASCII.
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


def _text_cell(queries: int, keys: int, room: int) -> tuple[int, int]:
    """Size of a character's cell: twice as many queries as keys, since a character is twice as tall as it is wide.

    A mask with far more or fewer queries than keys is stretched to between 8 and room / 2 lines.
    """
    wide = -(-keys // room)
    tall = min(2 * wide, -(-queries // 8))
    return max(tall, -(-2 * queries // room)), wide


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
    step = tick_step((len(str(keys)) + 3) / columns)
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
    step = tick_step(3 * tall)
    split_lines = {split // tall for split in splits}
    edge = []
    for line, first in enumerate(range(0, queries, tall)):
        number = -(-first // step) * step  # the first multiple of step from here on, if it is on this line
        label = str(number) if number < min(first + tall, queries) else ""
        edge.append(label.rjust(numbers) + " " + (glyphs.split_down if line in split_lines else glyphs.down))
    return edge
