import torch
from hypothesis import given, settings

from sightline.attention.tiles import Tile, build_tiles
from sightline.masks import AttentionMask, causal, document, global_tokens, shared_prefix, sliding_window
from tests.support.random_masks import expressions


def tiles_of(mask: AttentionMask) -> list[Tile]:
    return build_tiles(mask.start, mask.stop)


def dense_of(tiles: list[Tile], shape: tuple[int, int, int]) -> torch.Tensor:
    """Count how often the tiles compute each pair: int [B, Q, T]."""
    counts = torch.zeros(shape, dtype=torch.int32)
    for row, first, last, segments, fully_masked in tiles:
        for segment in segments:
            part = torch.ones(last - first, segment.last - segment.first, dtype=torch.bool)
            if segment.causal:
                assert part.shape[0] == part.shape[1] and segment.pattern is None
                part = part.tril()
            if segment.pattern is not None:
                part = segment.pattern.expand(part.shape)
            if fully_masked is not None:
                part = part & ~fully_masked[:, None]
            counts[row, first:last, segment.first : segment.last] += part.int()
    return counts


@settings(max_examples=150, deadline=None)
@given(expressions(max_length=60))
def test_tiles_compute_each_visible_pair_once_and_no_other(pair) -> None:
    mask, dense = pair
    tiles = tiles_of(mask)
    assert torch.equal(dense_of(tiles, mask.shape), dense.int())
    for tile in tiles:
        visible = dense[tile.row, tile.first : tile.last].any(dim=1)
        assert visible[0] and visible[-1], "a tile starts or ends with a fully masked query"
        assert torch.equal(visible, torch.ones_like(visible) if tile.fully_masked is None else ~tile.fully_masked)


def test_tiles_of_long_rows() -> None:
    """Long enough for causal squares, repeated window tiles, and slices without a pattern."""
    length = 2500
    ids = torch.repeat_interleave(torch.arange(6), torch.tensor([1, 300, 1, 700, 20, 1478]))[None]
    starts = torch.zeros(1, length, dtype=torch.bool)
    starts[:, :3] = True
    causal_mask = causal(1, length)
    for mask in (
        causal_mask & document(ids),
        sliding_window(1, length, 100) & document(ids),
        sliding_window(1, length, 900),
        (global_tokens(starts) | sliding_window(1, length, 64)) & causal_mask,
        shared_prefix(ids, torch.ones_like(ids)) & causal_mask,
        document(ids),
        causal_mask.take_queries(torch.arange(0, length, 3)),
        AttentionMask.from_dense(torch.rand(1, 300, length) < 0.002, max_intervals=100),
    ):
        assert torch.equal(dense_of(tiles_of(mask), mask.shape), mask.to_dense().int())


def test_a_causal_document_is_one_call() -> None:
    tiles = tiles_of(causal(1, 2000) & document(torch.arange(2000)[None] // 1000))
    assert tiles == [(0, 0, 1000, [(0, 1000, True, None)], None), (0, 1000, 2000, [(1000, 2000, True, None)], None)]


def test_keys_between_distant_intervals_are_not_computed() -> None:
    length = 4096
    first = torch.zeros(1, length, dtype=torch.bool)
    first[:, :4] = True
    mask = (global_tokens(first) | sliding_window(1, length, 64)) & causal(1, length)
    computed = sum(
        (tile.last - tile.first) * (segment.last - segment.first)
        for tile in tiles_of(mask)
        for segment in tile.segments
    )
    assert computed < 4 * int(mask.visible_pairs().sum())


def test_tiles_of_a_window_share_their_pattern() -> None:
    """Memory is O(S), independent of the number of tiles."""
    patterns = [s.pattern for tile in tiles_of(sliding_window(1, 16384, 256)) for s in tile.segments]
    assert len(patterns) > 100
    assert len({id(p) for p in patterns if p is not None}) < 6


def test_short_documents_share_tiles() -> None:
    ids = torch.arange(4096)[None] // 5
    assert len(tiles_of(causal(1, 4096) & document(ids))) < 50


def test_many_intervals_make_wide_tiles() -> None:
    """Masks that need the work of dense attention take few calls, each over many queries."""
    dense = torch.rand(1, 2048, 2048, generator=torch.Generator().manual_seed(0)) < 0.1
    mask = AttentionMask.from_dense(dense, max_intervals=2048)
    tiles = tiles_of(mask)
    assert torch.equal(dense_of(tiles, mask.shape), mask.to_dense().int())
    assert [tile.last - tile.first for tile in tiles] == [1024, 1024]


def test_equal_queries_with_many_intervals_share_one_row_of_a_pattern() -> None:
    dense = (torch.arange(500) % 2 == 0).expand(1, 300, -1)
    (tile,) = tiles_of(AttentionMask.from_dense(dense, max_intervals=500))
    assert [(s.first, s.last, s.pattern.shape) for s in tile.segments] == [(0, 499, (1, 499))]


def test_fully_masked_queries_between_others_do_not_split_tiles() -> None:
    length = 3000
    mask, masked = causal(1, length), (torch.arange(length) % 3 == 2)[None, :, None]
    mask = AttentionMask(mask.start.masked_fill(masked, 0), mask.stop.masked_fill(masked, 0), length)
    tiles = tiles_of(mask)
    assert torch.equal(dense_of(tiles, mask.shape), mask.to_dense().int())
    computed = sum((t.last - t.first) * (s.last - s.first) for t in tiles for s in t.segments)
    assert len(tiles) < 20 and computed < 0.6 * length**2


def test_long_gaps_of_fully_masked_queries_are_not_computed() -> None:
    ids = torch.full((1, 400), -1)
    ids[:, :9], ids[:, 9:20], ids[:, 200:210] = 0, 1, 2
    tiles = tiles_of(causal(1, 400) & document(ids))
    assert [(tile.first, tile.last, tile.fully_masked) for tile in tiles] == [(0, 20, None), (200, 210, None)]
