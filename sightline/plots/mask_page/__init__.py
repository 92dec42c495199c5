"""Attention masks as one self-contained HTML page: hover over a query to list its keys, zoom to single tokens."""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib import resources

import torch
from torch import Tensor

from sightline.masks import AttentionMask
from sightline.masks.statistics import check_row, segment_boundaries
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
    """Return an HTML page, without external resources, that shows one row of named masks.

    The page contains the intervals, run-length encoded, and renders them at any scale, so it is exact and small: a few
    kilobytes for 64k tokens of packed documents, about a megabyte for 64k tokens of an irregular mask.

    title       title of the page
    block_size  initial block size; the reader can choose another
    facts       further lines of the table of each mask, by its name: label -> value
    """
    if not masks:
        raise ValueError("no masks to show: got an empty dict, expected at least one mask by name")
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
    # "</" and "<!" could end a script element; escaping every "<" gives equivalent JSON without them.
    text = json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")
    page = _PAGE.joinpath("page.html").read_text(encoding="utf-8")
    scripts = {script: _PAGE.joinpath(script).read_text(encoding="utf-8") for script in ("data.js", "view.js")}
    for name, value in {"TEXT": TEXT, "BLUE": BLUE, **scripts, "data": text}.items():
        page = page.replace("{{" + name + "}}", value)
    return page


def _encode(mask: AttentionMask, row: int) -> dict[str, object]:
    """Encode a row as JSON data: `start` and `stop` as one run-length encoded list per interval, and `boundaries`."""
    _, queries, keys = mask.shape
    return {
        "queries": queries,
        "keys": keys,
        "start": [_runs(column) for column in mask.start[row].cpu().unbind(1)],
        "stop": [_runs(column) for column in mask.stop[row].cpu().unbind(1)],
        "boundaries": _runs(torch.tensor(segment_boundaries(mask, row), dtype=torch.int32)),
    }


def _runs(values: Tensor) -> list[int]:
    """Run-length encode the steps of integers [N]: 5 5 5 6 7 8 -> steps 5 x 1, 0 x 2, 1 x 3 -> [5, 1, 0, 2, 1, 3].

    Documents, windows and causal masks give long runs, since starts and stops are constant or increase by one.
    """
    steps = torch.diff(values, prepend=values.new_zeros(1))
    step, repeats = torch.unique_consecutive(steps, return_counts=True)
    return torch.stack([step.long(), repeats], dim=1).flatten().tolist()
