"""Attention masks as text for the terminal."""

from __future__ import annotations

import textwrap
from dataclasses import dataclass

import torch

from sightline.masks import AttentionMask
from sightline.masks.statistics import check_row, occupancy, segment_boundaries, visible_in_cells
from sightline.plots.palette import tick_step

MAX_LINES = 64  # up to this many queries are shown on one line each
HALVES = " ▄▀█"  # index: 2 * (visible to the upper query) + (visible to the lower query)


@dataclass(frozen=True, kw_only=True)
class _Glyphs:
    """Characters of a plot. `shades`, by the visible fraction of a cell: 0, under 1/3, under 2/3, under 1, 1."""

    visible: str
    hidden: str
    shades: str
    corner: str
    across: str
    down: str
    boundary_across: str
    boundary_down: str


_UNICODE = _Glyphs(
    visible="██", hidden=" ·", shades=" ░▒▓█", corner="┌", across="─", down="│", boundary_across="┬", boundary_down="├"
)
_ASCII = _Glyphs(
    visible="##", hidden=" .", shades=" .+*#", corner="+", across="-", down="|", boundary_across="v", boundary_down=">"
)


def to_text(mask: AttentionMask, row: int = 0, width: int = 80, unicode: bool = True) -> str:
    """Render a row of a mask as text of at most `width` columns: queries from top to bottom, keys from left to right.

    Small masks are shown token by token, if necessary with half blocks; in larger ones a character is a cell of several
    tokens, shaded by its visible fraction. `unicode=False` uses ASCII only.

    Raises:
        ValueError: if the mask has no such row, or `width` is less than 24.
    """
    check_row(mask, row)
    if width < 24:
        raise ValueError(f"a mask as text needs a width of at least 24 columns, got {width}")
    _, queries, keys = mask.shape
    glyphs = _UNICODE if unicode else _ASCII
    numbers = max(5, len(str(queries - 1)))  # columns for the query numbers
    room = width - numbers - 2
    if 2 * max(queries, keys) <= min(MAX_LINES, room):
        columns, tall = 2.0, 1
        body = _render_tokens(mask, row, glyphs.hidden, glyphs.visible)
        legend = "a line is a query, two columns are a key"
    elif unicode and max(queries, keys) <= room:
        columns, tall = 1.0, 2
        body = _render_halves(mask, row)
        legend = "a line is two queries, a column is a key"
    elif max(queries, keys) <= min(MAX_LINES, room):
        columns, tall = 1.0, 1
        body = _render_tokens(mask, row, glyphs.hidden[1], glyphs.visible[1])
        legend = "a line is a query, a column is a key"
    else:
        tall, wide = _text_cell(queries, keys, room)
        columns = 1 / wide
        body = _render_shades(mask, row, (tall, wide), glyphs.shades)
        meanings = zip(glyphs.shades[1:], ("under 1/3", "under 2/3", "under 1", "all"), strict=True)
        legend = f"a character is {tall:,} x {wide:,} tokens (queries x keys); visible: "
        legend += ", ".join(f"{shade} {meaning}" for shade, meaning in meanings)
    boundaries = segment_boundaries(mask, row)
    if columns < 1 and len(boundaries) > len(body) / 3:  # too many to mark
        legend += f"; {len(boundaries) + 1:,} independent segments"
        boundaries = []
    elif boundaries:
        legend += f"; no query attends across {glyphs.boundary_across} {glyphs.boundary_down}"
    left = " " * numbers
    head = [
        "query" + left[5:] + "  " + _key_numbers(keys, columns, room),
        left + " " + _ruler(keys, columns, boundaries, glyphs),
    ]
    gutter = _gutter(queries, tall, boundaries, glyphs, numbers)
    plot = head + [edge + line for edge, line in zip(gutter, body, strict=True)]
    return "\n".join([*(line.rstrip() for line in plot), *textwrap.wrap(legend, width)])


def _text_cell(queries: int, keys: int, room: int) -> tuple[int, int]:
    """Return the queries and keys per character: twice as many queries, since a character is twice as tall as wide.

    If the numbers of queries and keys differ much, the plot is stretched to between 8 and room / 2 lines.
    """
    wide = -(-keys // room)
    tall = min(2 * wide, -(-queries // 8))
    return max(tall, -(-2 * queries // room)), wide


def _render_tokens(mask: AttentionMask, row: int, hidden: str, visible: str) -> list[str]:
    pairs = visible_in_cells(mask, row, (1, 1)).tolist()
    return ["".join(visible if pair else hidden for pair in line) for line in pairs]


def _render_halves(mask: AttentionMask, row: int) -> list[str]:
    visible = visible_in_cells(mask, row, (1, 1))
    visible = torch.cat([visible, visible.new_zeros(visible.shape[0] % 2, visible.shape[1])])
    glyphs = 2 * visible[0::2] + visible[1::2]
    return ["".join(HALVES[glyph] for glyph in line) for line in glyphs.tolist()]


def _render_shades(mask: AttentionMask, row: int, cell: tuple[int, int], shades: str) -> list[str]:
    share = occupancy(mask, row, cell)
    level = (share > 0).long() + (share >= 1 / 3) + (share >= 2 / 3) + (share >= 1)
    return ["".join(shades[index] for index in line) for line in level.tolist()]


def _key_numbers(keys: int, columns: float, room: int) -> str:
    """Return a line with key numbers above their columns, up to `room` characters; `columns` is the width of a key."""
    step = tick_step((len(str(keys)) + 3) / columns)
    line = ""
    for key in range(0, keys, step):
        line = line.ljust(int(key * columns)) + str(key)
    return line if len(line) <= room else line[: line.rindex(" ")]


def _ruler(keys: int, columns: float, boundaries: list[int], glyphs: _Glyphs) -> str:
    """Return the top edge of the plot."""
    edge = [glyphs.across] * max(1, int(-(-keys * columns // 1)))
    for boundary in boundaries:
        edge[int(boundary * columns)] = glyphs.boundary_across
    return glyphs.corner + "".join(edge)


def _gutter(queries: int, tall: int, boundaries: list[int], glyphs: _Glyphs, numbers: int) -> list[str]:
    """Return the left edge of the plot, one string per line of `tall` queries, with some query numbers."""
    step = tick_step(3 * tall)
    boundary_lines = {boundary // tall for boundary in boundaries}
    edge = []
    for line, first in enumerate(range(0, queries, tall)):
        number = -(-first // step) * step  # the next multiple of step, shown if it is on this line
        label = str(number) if number < min(first + tall, queries) else ""
        edge.append(label.rjust(numbers) + " " + (glyphs.boundary_down if line in boundary_lines else glyphs.down))
    return edge
