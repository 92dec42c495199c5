"""What pictures say of a mask, against its dense form."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sightline.masks import AttentionMask, causal, document, global_tokens, pictures, sliding_window
from sightline.masks.pictures import get_statistics, occupancy, separations, to_text, visible_in_cells


@st.composite
def masks(draw: st.DrawFn, longest: int = 40, square: bool = False) -> AttentionMask:
    """Any mask of up to 3 intervals a query, with empty queries, rows of different content, Q and T apart."""
    rows, queries, width = (draw(st.integers(1, most)) for most in (2, longest, 3))
    keys = queries if square else draw(st.integers(1, longest))
    numbers = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    start = torch.randint(0, keys + 1, (rows, queries, width), generator=numbers)
    length = torch.randint(0, draw(st.integers(1, keys)) + 1, start.shape, generator=numbers)
    seen = torch.rand(start.shape, generator=numbers) < draw(st.sampled_from([0.3, 0.9]))
    return AttentionMask.from_intervals(start, start + length * seen, keys)


def documents(*lengths: int, padding: int = 0) -> torch.Tensor:
    ids = [number for number, length in enumerate(lengths) for _ in range(length)]
    return torch.tensor([ids + [-1] * padding])


def packed(*lengths: int, padding: int = 0) -> AttentionMask:
    return causal(1, sum(lengths) + padding) & document(documents(*lengths, padding=padding))


@settings(max_examples=60, deadline=None)
@given(mask=masks(), tall=st.integers(1, 45), wide=st.integers(1, 45), data=st.data())
def test_occupancy_is_the_mean_of_the_dense_mask(
    mask: AttentionMask, tall: int, wide: int, data: st.DataObject
) -> None:
    row = data.draw(st.integers(0, mask.shape[0] - 1))
    dense = mask.to_dense()[row].double()
    _, queries, keys = mask.shape
    cells = [
        [dense[q : q + tall, k : k + wide] for k in range(0, keys, wide)] for q in range(0, queries, tall)
    ]  # slices end at the edge, so edge cells have their true size
    assert torch.equal(
        visible_in_cells(mask, row, (tall, wide)), torch.tensor([[c.sum() for c in line] for line in cells]).long()
    )
    expected = torch.tensor([[c.mean() for c in line] for line in cells], dtype=torch.float64)
    torch.testing.assert_close(occupancy(mask, row, (tall, wide)), expected, rtol=1e-12, atol=0)


def test_occupancy_of_a_causal_mask_by_hand() -> None:
    assert visible_in_cells(causal(1, 5), 0, (2, 2)).tolist() == [[3, 0, 0], [4, 3, 0], [2, 2, 1]]
    assert occupancy(causal(1, 5), 0, (2, 2)).tolist() == [[0.75, 0, 0], [1, 0.75, 0], [1, 1, 1]]


@settings(max_examples=60, deadline=None)
@given(mask=masks(), size=st.integers(1, 45), at_once=st.sampled_from([1, 7, 2**22]))
def test_blocks_are_counted_as_in_the_dense_mask(mask: AttentionMask, size: int, at_once: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pictures, "BLOCKS_AT_ONCE", at_once)
        statistics = get_statistics(mask, size)
    _, queries, keys = mask.shape
    sums = [
        int(dense[q : q + size, k : k + size].sum())
        for dense in mask.to_dense()
        for q in range(0, queries, size)
        for k in range(0, keys, size)
    ]
    full, empty = sums.count(size * size), sums.count(0)
    assert statistics.blocks == (full, len(sums) - full - empty, empty)
    assert statistics.visible_pairs == mask.to_dense().sum((1, 2)).tolist()


def test_blocks_are_those_of_the_block_mask() -> None:
    mask = packed(300, 41, 700, padding=30)
    full, partial, empty = get_statistics(mask, 128).blocks
    block_mask = mask.to_block_mask(128)
    assert block_mask.full_kv_num_blocks is not None
    assert (full, partial) == (int(block_mask.full_kv_num_blocks.sum()), int(block_mask.kv_num_blocks.sum()))
    assert full + partial + empty == 9 * 9


def test_statistics_by_hand() -> None:
    statistics = get_statistics(causal(2, 4), 2)
    assert (statistics.queries, statistics.keys, statistics.intervals) == (4, 4, 1)
    assert statistics.visible_pairs == [10, 10]
    assert (statistics.share_of_causal, statistics.sparsity) == (1.0, 1 - 10 / 16)
    assert statistics.blocks == (2, 4, 2)
    assert statistics.describe() == "S 4, K 1, 10 visible pairs (100.0% of causal)"


def test_statistics_of_a_cross_mask_have_no_share_of_causal() -> None:
    statistics = get_statistics(document(documents(1, 1), documents(3, 5)))
    assert statistics.share_of_causal is None
    assert statistics.describe() == "Q 2, T 8, K 1, 8 visible pairs (50.0% of all)"


def test_a_block_holds_a_token() -> None:
    with pytest.raises(ValueError, match="at least 1 token, got 0"):
        get_statistics(causal(1, 4), 0)


def test_separations_are_document_boundaries() -> None:
    assert separations(packed(3, 4, 1, 2), 0) == [3, 7, 8]
    assert separations(packed(3, 4, padding=3), 0) == [3, 7]  # padding is one part
    assert separations(packed(6) & sliding_window(1, 6, 2), 0) == []
    assert separations(document(documents(2, 2)) | global_tokens(torch.arange(4)[None] == 0), 0) == []
    assert separations(document(documents(2, 2), documents(3, 5)), 0) == []  # other keys than queries


@settings(max_examples=60, deadline=None)
@given(mask=masks(longest=12, square=True))
def test_separations_are_where_nothing_sees_across(mask: AttentionMask) -> None:
    dense = mask.to_dense()[0]
    blind = ~dense.any(1)
    expected = [
        at
        for at in range(1, len(dense))
        if not dense[at:, :at].any() and not dense[:at, at:].any() and not (blind[at] and blind[at - 1])
    ]
    assert separations(mask, 0) == expected


def test_a_small_mask_as_text() -> None:
    assert to_text(packed(3, 4, padding=1)).splitlines() == [
        "query  0   2   4   6",
        "      ┌──────┬───────┬─",
        "    0 │██ · · · · · · ·",
        "      │████ · · · · · ·",
        "      │██████ · · · · ·",
        "      ├ · · ·██ · · · ·",
        "    4 │ · · ·████ · · ·",
        "      │ · · ·██████ · ·",
        "      │ · · ·████████ ·",
        "      ├ · · · · · · · ·",
        "a line is a query, two columns are a key; nothing sees across ┬ ├",
    ]


def test_text_marks_what_nothing_sees_across() -> None:
    lines = to_text(packed(6, 6), unicode=False).splitlines()
    assert lines[1] == "      +------------v-----------"
    assert [line[6] for line in lines[2:-1]] == list("||||||>|||||")
    assert lines[-1].endswith("nothing sees across v >")


@settings(max_examples=40, deadline=None)
@given(mask=masks(longest=72))
def test_text_shows_every_token_of_a_small_mask(mask: AttentionMask) -> None:
    """Read back from the characters, whichever way they were drawn."""
    _, queries, keys = mask.shape
    body = [line[7:].ljust(80) for line in to_text(mask, 0, width=80).splitlines()[2:]]
    if "two columns" in to_text(mask, 0, width=80):
        read = [[line[2 * key : 2 * key + 2] == "██" for key in range(keys)] for line in body[:queries]]
    else:
        read = [[line[key] in half for key in range(keys)] for line in body for half in ("▀█", "▄█")][:queries]
    assert read == mask.to_dense()[0].tolist()


@pytest.mark.parametrize("width", [24, 40, 80, 200])
@pytest.mark.parametrize("unicode", [True, False])
@pytest.mark.parametrize(
    "mask",
    [
        causal(1, 1),
        packed(20, 44),
        packed(*[7] * 300),
        packed(30_000, 536, 35_000),
        document(documents(1), documents(5000)),
        document(documents(5000), documents(1)),
    ],
    ids=["one token", "64 tokens", "300 documents", "64k tokens", "one query", "one key"],
)
def test_text_keeps_to_its_width_and_alphabet(mask: AttentionMask, width: int, unicode: bool) -> None:
    text = to_text(mask, 0, width=width, unicode=unicode)
    assert all(len(line) <= width for line in text.splitlines())
    assert len(text.splitlines()) <= max(70, width)
    assert unicode or text.isascii()
    assert any(character in text for character in ("█▓▒░▄▀" if unicode else ".+*#"))


def test_shades_say_how_much_of_a_cell_is_visible() -> None:
    """Cells of 200 queries x 100 keys: all, none, and on the diagonal some."""
    lines = to_text(packed(4000, 3300), width=80).splitlines()
    assert "200 x 100 tokens" in " ".join(lines)
    assert lines[1][7:].index("┬") == 40
    assert lines[2] == "    0 │▓░"  # three quarters of the first cell and a quarter of the one right of it
    assert lines[11][7:] == "█" * 18 + "▓░"
    assert lines[22] == " 4096 ├" + " " * 40 + "▓░"


def test_text_refuses_what_it_cannot_draw() -> None:
    with pytest.raises(ValueError, match=r"row 2 is not in this mask of 2 rows: choose 0 to 1"):
        to_text(causal(2, 4), row=2)
    with pytest.raises(ValueError, match="at least 24 columns, got 10"):
        to_text(causal(2, 4), width=10)
