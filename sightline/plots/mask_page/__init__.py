"""A mask as one self-contained HTML page: hover over a query and read its keys, zoom down to single tokens."""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib import resources

import torch
from torch import Tensor

from sightline.masks import AttentionMask
from sightline.masks.statistics import check_row, separations
from sightline.plots.palette import BLUE, TEXT

_PAGE = resources.files("sightline.plots.mask_page")


def to_html(
    masks: Mapping[str, AttentionMask],
    row: int = 0,
    *,
    title: str = "Attention masks",
    block_size: int = 128,
    facts: Mapping[str, Mapping[str, str]] | None = None,
) -> str:
    """One row of named masks as a page that needs nothing but a browser.

    The page holds the intervals themselves, as runs of equal steps, and draws them at any scale, so it is exact and
    small: 64k tokens in documents are a few kilobytes, 64k tokens without any order about a megabyte.

    title, facts  what else it tells of the row, and of each mask by name: label -> value
    block_size    the block size it starts with; the reader may choose another
    """
    if not masks:
        raise ValueError("no masks to show: give at least one, by name")
    for mask in masks.values():
        check_row(mask, row)
    data = {
        "title": title,
        "row": row,
        "block_size": block_size,
        "masks": [
            {"name": name, **_encode(mask, row), "facts": (facts or {}).get(name, {})} for name, mask in masks.items()
        ],
    }
    # Inside a script element only "</" and "<!" could end or confuse it; as an escape "<" is the same JSON.
    text = json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")
    page = _PAGE.joinpath("page.html").read_text(encoding="utf-8")
    scripts = {script: _PAGE.joinpath(script).read_text(encoding="utf-8") for script in ("data.js", "view.js")}
    for name, value in {"TEXT": TEXT, "BLUE": BLUE, **scripts, "data": text}.items():
        page = page.replace("{{" + name + "}}", value)
    return page


def _encode(mask: AttentionMask, row: int) -> dict[str, object]:
    """`start` and `stop` are one list of runs per interval; `parts` are the separations as runs."""
    _, queries, keys = mask.shape
    return {
        "queries": queries,
        "keys": keys,
        "start": [_runs(column) for column in mask.start[row].cpu().unbind(1)],
        "stop": [_runs(column) for column in mask.stop[row].cpu().unbind(1)],
        "parts": _runs(torch.tensor(separations(mask, row), dtype=torch.int32)),
    }


def _runs(values: Tensor) -> list[int]:
    """Integers [N] as steps and how often each repeats: 5 5 5 6 7 8 -> step 5 x 1, 0 x 2, 1 x 3 -> [5, 1, 0, 2, 1, 3].

    Documents, windows and causal edges make long runs: a start stays or follows the query, a stop does likewise.
    """
    steps = torch.diff(values, prepend=values.new_zeros(1))
    step, repeats = torch.unique_consecutive(steps, return_counts=True)
    return torch.stack([step.long(), repeats], dim=1).flatten().tolist()
