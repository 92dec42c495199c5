"""A mask as text, compared with its dense mask."""

import pytest
from hypothesis import given, settings

from sightline.masks import AttentionMask, causal, document
from sightline.plots.mask_text import to_text
from tests.support.random_masks import documents, packed, scattered_masks


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
        "a line is a query, two columns are a key; no query attends across ┬ ├",
    ]


def test_segment_boundaries_are_marked() -> None:
    lines = to_text(packed(6, 6), unicode=False).splitlines()
    assert lines[1] == "      +------------v-----------"
    assert [line[6] for line in lines[2:-1]] == list("||||||>|||||")
    assert lines[-1].endswith("no query attends across v >")


@settings(max_examples=40, deadline=None)
@given(mask=scattered_masks(longest=72))
def test_small_masks_are_shown_token_by_token(mask: AttentionMask) -> None:
    """Decode the characters of both styles and compare with the dense mask."""
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
def test_text_has_the_requested_width_and_alphabet(mask: AttentionMask, width: int, unicode: bool) -> None:
    text = to_text(mask, 0, width=width, unicode=unicode)
    assert all(len(line) <= width for line in text.splitlines())
    assert len(text.splitlines()) <= max(70, width)
    assert unicode or text.isascii()
    assert any(character in text for character in ("█▓▒░▄▀" if unicode else ".+*#"))


def test_shades_show_the_visible_fraction() -> None:
    """Cells of 200 queries x 100 keys: fully visible, empty, and partially visible on the diagonal."""
    lines = to_text(packed(4000, 3300), width=80).splitlines()
    assert "200 x 100 tokens" in " ".join(lines)
    assert lines[1][7:].index("┬") == 40
    assert lines[2] == "    0 │▓░"  # three quarters of the first cell and a quarter of the second
    assert lines[11][7:] == "█" * 18 + "▓░"
    assert lines[22] == " 4096 ├" + " " * 40 + "▓░"


def test_invalid_arguments() -> None:
    with pytest.raises(ValueError, match=r"row 2 is not in this mask of 2 rows: choose 0 to 1"):
        to_text(causal(2, 4), row=2)
    with pytest.raises(ValueError, match="at least 24 columns, got 10"):
        to_text(causal(2, 4), width=10)
