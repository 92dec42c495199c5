"""The HTML page of a mask: its encoded data, and its JavaScript functions."""

import json
import re
import shutil
import subprocess
from importlib import resources
from itertools import pairwise

import pytest
import torch

from sightline.masks import AttentionMask, causal, global_tokens, sliding_window
from sightline.masks.statistics import get_statistics, segment_boundaries, visible_in_cells
from sightline.plots.mask_page import to_html
from tests.support.random_masks import packed

NODE = shutil.which("node")
needs_node = pytest.mark.skipif(NODE is None, reason="node is needed to run JavaScript")


def scattered(queries: int, keys: int, width: int, seed: int = 0) -> AttentionMask:
    """Two rows of random intervals, with some fully masked queries."""
    numbers = torch.Generator().manual_seed(seed)
    start = torch.randint(0, keys, (2, queries, width), generator=numbers)
    length = torch.randint(0, max(2, keys // 3), start.shape, generator=numbers)
    mask_keys = torch.rand(start.shape, generator=numbers) < 0.7
    return AttentionMask.from_intervals(start, start + length * mask_keys, keys)


MASKS = {
    "documents": packed(5, 1, 9, padding=3),
    "window and sinks": sliding_window(1, 40, 6) | global_tokens(torch.arange(40)[None] % 17 == 0),
    "cross": scattered(23, 61, 3)[0],
    "one token": causal(1, 1),
    "fully masked": packed(0, padding=4),
}


def data_of(page: str) -> dict:
    found = re.search(r'<script id="data" type="application/json">(.*?)</script>', page, re.DOTALL)
    assert found
    return json.loads(found.group(1))


def decode(runs: list[int]) -> list[int]:
    """Decode runs: [5, 1, 0, 2, 1, 3] is 5 5 5 6 7 8."""
    steps = [step for step, repeats in zip(runs[::2], runs[1::2], strict=True) for _ in range(repeats)]
    return torch.tensor(steps).cumsum(0).tolist()


def test_the_page_contains_the_intervals() -> None:
    data = data_of(to_html(MASKS, title="five masks", block_size=16))
    assert (data["title"], data["row"], data["block_size"]) == ("five masks", 0, 16)
    assert [entry["name"] for entry in data["masks"]] == list(MASKS)
    for entry, mask in zip(data["masks"], MASKS.values(), strict=True):
        assert (entry["queries"], entry["keys"]) == mask.shape[1:]
        assert [decode(runs) for runs in entry["start"]] == mask.start[0].T.tolist()
        assert [decode(runs) for runs in entry["stop"]] == mask.stop[0].T.tolist()
        assert decode(entry["boundaries"]) == segment_boundaries(mask, 0)


def test_the_page_contains_the_requested_row() -> None:
    mask = scattered(9, 9, 2)
    entry = data_of(to_html({"mask": mask}, row=1))["masks"][0]
    assert [decode(runs) for runs in entry["stop"]] == mask.stop[1].T.tolist() != mask.stop[0].T.tolist()


def test_run_length_encoding_of_documents() -> None:
    """Three causal documents: start is 0 0 0 3 3 3 3 7, stop is 1 2 3 4 5 6 7 8."""
    entry = data_of(to_html({"mask": packed(3, 4, 1)}))["masks"][0]
    assert entry["start"] == [[0, 3, 3, 1, 0, 3, 4, 1]]
    assert entry["stop"] == [[1, 8]]
    assert entry["boundaries"] == [3, 1, 4, 1]


def test_a_page_of_64k_tokens_is_small() -> None:
    empty_size = len(to_html({"mask": causal(1, 1)}))
    assert empty_size < 64_000
    assert len(to_html({"mask": packed(*[256] * 256)})) - empty_size < 8_000
    numbers = torch.Generator().manual_seed(0)
    ends = torch.randint(0, 65_537, (2, 1, 65_536, 1), generator=numbers)
    assert len(to_html({"mask": AttentionMask.from_intervals(ends.amin(0), ends.amax(0), 65_536)})) < 2_000_000


def test_the_page_is_complete_and_has_no_external_resources() -> None:
    page = to_html({"mask": causal(1, 4)})
    assert not re.search(r"https?:|\ssrc=|\shref=|@import|url\(", page)
    assert "{{" not in page
    assert page.count("<script") == page.count("</script>") == 3


def test_names_are_escaped() -> None:
    name = '</script><script>alert("x")</script> <!-- {{view.js}}'
    page = to_html({name: causal(1, 2)}, title=name, facts={name: {name: name}})
    assert page.count("<script") == page.count("</script>") == 3
    data = data_of(page)
    assert data["title"] == data["masks"][0]["name"] == name
    assert data["masks"][0]["facts"] == {name: name}


def test_invalid_arguments() -> None:
    with pytest.raises(ValueError, match="no masks to show"):
        to_html({})
    with pytest.raises(ValueError, match="row 1 is not in this mask of 1 rows"):
        to_html({"mask": causal(1, 2)}, row=1)


def run_in_node(call: str, data: dict) -> list:
    """Evaluate `call`, a JavaScript expression of `mask`, for each mask of the page's data."""
    functions = resources.files("sightline.plots.mask_page").joinpath("data.js").read_text()
    script = f"""{functions}
    const data = JSON.parse(require("fs").readFileSync(0, "utf8"));
    const plain = (key, value) => ArrayBuffer.isView(value) ? Array.from(value) : value;
    console.log(JSON.stringify(data.masks.map(decodeMask).map(mask => {call}), plain));
    """
    assert NODE
    done = subprocess.run([NODE, "-e", script], input=json.dumps(data), capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@needs_node
@pytest.mark.parametrize("script", ["data.js", "view.js"])
def test_the_scripts_are_valid_javascript(script: str) -> None:
    assert NODE
    with resources.as_file(resources.files("sightline.plots.mask_page").joinpath(script)) as path:
        done = subprocess.run([NODE, "--check", path], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


@needs_node
def test_keys_of_every_query() -> None:
    call = "[...Array(mask.queries).keys()].map(query => keysOf(mask, query))"
    for mask, mask_keys in zip(MASKS.values(), run_in_node(call, data_of(to_html(MASKS))), strict=True):
        dense = torch.zeros(mask.shape[1:], dtype=torch.bool)
        for query, intervals in enumerate(mask_keys):
            for start, stop in intervals:
                dense[query, start:stop] = True
        assert torch.equal(dense, mask.to_dense()[0])


@needs_node
def test_visible_pairs_and_segments() -> None:
    call = "[countPairs(mask), [...Array(mask.queries).keys()].map(query => segmentOf(mask, query))]"
    for mask, (pairs, segments) in zip(MASKS.values(), run_in_node(call, data_of(to_html(MASKS))), strict=True):
        assert pairs == int(mask.visible_pairs())
        if mask.shape[1] != mask.shape[2]:
            assert set(segments) == {None}
            continue
        bounds = [0, *segment_boundaries(mask, 0), mask.shape[2]]
        expected = [
            {"number": number, "start": start, "stop": stop}
            for number, (start, stop) in enumerate(pairwise(bounds))
            for _ in range(start, stop)
        ]
        assert segments == expected


@needs_node
@pytest.mark.parametrize("size", [1, 4, 7, 128])
def test_block_counts(size: int) -> None:
    masks = {**MASKS, "long": packed(300, 41, 700, padding=30)}
    results = run_in_node(f"blockStates(mask, {size})", data_of(to_html(masks)))
    for mask, blocks in zip(masks.values(), results, strict=True):
        assert (blocks["full"], blocks["partial"], blocks["empty"]) == get_statistics(mask, size).blocks
        visible = visible_in_cells(mask, 0, (size, size)).flatten().tolist()
        assert blocks["states"] == [2 if pairs == size * size else int(pairs > 0) for pairs in visible]


@needs_node
@pytest.mark.parametrize(
    ("query", "key", "tall", "wide"), [(0, 0, 1, 1), (3, 2, 2, 5), (1, 0, 4, 2.5), (2, 1.5, 1, 0.5)]
)
def test_pairs_in_cells(query: float, key: float, tall: float, wide: float) -> None:
    """Cells of any size and origin, against the dense mask at a resolution of half a key."""
    lines, columns = 6, 8
    call = f"pairsInCells(mask, {query}, {key}, {tall}, {wide}, {lines}, {columns})"
    for mask, result in zip(MASKS.values(), run_in_node(call, data_of(to_html(MASKS))), strict=True):
        _, queries, keys = mask.shape
        halves = torch.zeros(max(queries, 64), 2 * max(keys, 64))
        halves[:queries, : 2 * keys] = mask.to_dense()[0].repeat_interleave(2, dim=1) / 2
        expected = [
            halves[
                query + line * tall : query + (line + 1) * tall,
                int(2 * (key + column * wide)) : int(2 * (key + (column + 1) * wide)),
            ]
            for line in range(lines)
            for column in range(columns)
        ]
        assert result["pairs"] == pytest.approx([float(cell.sum()) for cell in expected])
        assert result["queriesOfLine"] == [
            max(0, min(queries, query + (line + 1) * tall) - (query + line * tall)) for line in range(lines)
        ]
