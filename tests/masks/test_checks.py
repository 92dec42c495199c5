"""Errors for what users pass to an AttentionMask, and `validate`, compared with `from_intervals`."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from sightline.masks import AttentionMask, causal
from tests.support.random_masks import assert_canonical, expressions

ZEROS = torch.zeros(2, 3, 1, dtype=torch.int32)


def raw(intervals: list[tuple[int, int]], key_length: int = 8) -> AttentionMask:
    """A mask of two rows and three queries of the same intervals, without canonicalization."""
    start, stop = torch.tensor(intervals, dtype=torch.int32).expand(2, 3, -1, -1).unbind(3)
    return AttentionMask(start, stop, key_length)


@settings(max_examples=100, deadline=None)
@given(expressions(), st.data())
def test_masks_of_rules_and_their_parts_are_valid(pair, data) -> None:
    mask, _ = pair
    mask.validate()
    queries = data.draw(st.lists(st.integers(0, mask.shape[1] - 1), max_size=9))
    mask.take_queries(torch.tensor(queries, dtype=torch.int64)).validate()
    longer = AttentionMask(F.pad(mask.start, (0, 2)), F.pad(mask.stop, (0, 2)), mask.key_length)
    longer.validate()  # K may exceed the need, as in a micro-batch of a pipeline


@settings(max_examples=300, deadline=None)
@given(st.integers(1, 3), st.integers(0, 2**31))
def test_valid_exactly_if_canonical(width: int, seed: int) -> None:
    """Random bounds around [0, 6) are valid if and only if `from_intervals` changes nothing but K."""
    generator = torch.Generator().manual_seed(seed)
    start = torch.randint(-1, 8, (1, 1, width), generator=generator, dtype=torch.int32)
    stop = torch.randint(-1, 8, (1, 1, width), generator=generator, dtype=torch.int32)
    if seed % 2:  # often valid: sorted bounds inside the keys, with unused intervals
        bounds = torch.cat([start, stop], dim=2).clamp(0, 6).sort(dim=2).values
        used = torch.rand(width, generator=generator) < 0.7
        start, stop = bounds[..., 0::2] * used, bounds[..., 1::2] * used
    mask = AttentionMask(start, stop, 6)
    canonical = AttentionMask.from_intervals(start, stop, 6)
    padding = (0, width - canonical.intervals)
    if torch.equal(F.pad(canonical.start, padding), start) and torch.equal(F.pad(canonical.stop, padding), stop):
        mask.validate()
    else:
        with pytest.raises(ValueError, match=r"interval \d of row 0, query 0 is \[.*AttentionMask.from_intervals"):
            mask.validate()


@pytest.mark.parametrize(
    ("intervals", "message"),
    [
        ([(-1, 3)], r"interval 0 of row 0, query 0 is \[-1, 3\), which extends outside the keys \[0, 8\)"),
        ([(0, 9)], r"\[0, 9\), which extends outside"),
        ([(5, 2)], r"\[5, 2\), which starts after its end"),
        ([(3, 3)], r"\[3, 3\), which is empty, but an unused interval must be \[0, 0\)"),
        ([(0, 0), (3, 5)], r"interval 1 .* \[3, 5\), which follows an empty interval"),
        ([(3, 5), (0, 2)], r"\[0, 2\), which overlaps, touches or precedes the interval before it, \[3, 5\)"),
        ([(0, 4), (3, 6)], r"\[3, 6\), which overlaps"),
        ([(0, 3), (3, 6)], r"\[3, 6\), which overlaps, touches"),
        ([(0, 2**31 - 1)], "extends outside"),
        ([(-(2**31), 2**31 - 1)], "extends outside"),
    ],
)
def test_validate_names_the_interval(intervals: list[tuple[int, int]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        raw(intervals).validate()


def test_validate_names_the_row_and_query() -> None:
    start = torch.zeros(3, 4, 1, dtype=torch.int32)
    start[2, 1] = -7
    with pytest.raises(ValueError, match=r"row 2, query 1 is \[-7, 0\)"):
        AttentionMask(start, torch.zeros_like(start), 5).validate()


def test_integers_of_any_width_are_clipped_and_never_wrap() -> None:
    start = torch.tensor([[[-(2**40), 2**40], [2**32 + 1, -(2**63)]]])
    stop = torch.tensor([[[2**32 + 3, 2**41], [2**32 + 2, 2**63 - 1]]])
    mask = AttentionMask.from_intervals(start, stop, 6)
    assert mask.start.tolist() == [[[0], [0]]] and mask.stop.tolist() == [[[6], [6]]]
    assert_canonical(mask)
    far = AttentionMask.from_intervals(torch.tensor([[[2**32]]]), torch.tensor([[[2**32 + 4]]]), 6)
    assert not far.to_dense().any()  # as int32, these would be [0, 4)
    for dtype in (torch.int8, torch.int16, torch.uint8):
        narrow = AttentionMask.from_intervals(ZEROS.to(dtype) + 1, ZEROS + 100, 1000)
        assert (narrow.start == 1).all() and (narrow.stop == 100).all()


def test_no_intervals_at_all() -> None:
    mask = AttentionMask.from_intervals(ZEROS[..., :0], ZEROS[..., :0], 4)
    assert mask.shape == (2, 3, 4) and mask.intervals == 1 and not mask.to_dense().any()


META = ZEROS.to("meta")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: AttentionMask.from_intervals(ZEROS.float(), ZEROS.float(), 4), "must be integers .*float32"),
        (lambda: AttentionMask.from_intervals(ZEROS.bool(), ZEROS.bool(), 4), "got torch.bool.*from_dense"),
        (lambda: AttentionMask.from_intervals(ZEROS, ZEROS.to(torch.uint64), 4), "stop must be integers.*uint64"),
        (lambda: AttentionMask.from_intervals([[[0]]], [[[1]]], 4), r"start must be integers \[B, Q, K\].*list"),
        (lambda: AttentionMask.from_intervals(ZEROS[0], ZEROS[0], 4), r"int32, got torch.int32 \(3, 1\)"),
        (lambda: AttentionMask.from_intervals(ZEROS, ZEROS[:1], 4), r"\(2, 3, 1\) and stop \(1, 3, 1\) differ"),
        (lambda: AttentionMask.from_intervals(ZEROS, META, 4), "start is on 'cpu' and stop on 'meta'"),
        (lambda: AttentionMask.from_intervals(ZEROS, ZEROS, -1), "key_length must be an int from 0 .*got -1"),
        (lambda: AttentionMask.from_intervals(ZEROS, ZEROS, 2**31), "key_length .*2147483647, got 2147483648"),
        (lambda: AttentionMask.from_intervals(ZEROS, ZEROS, 4.0), r"key_length .*got 4\.0"),
        (lambda: AttentionMask(ZEROS, ZEROS, True), "key_length .*got True"),
        (lambda: AttentionMask(ZEROS, ZEROS, torch.tensor(4)), "key_length .*got tensor"),
        (lambda: AttentionMask(ZEROS, ZEROS.long(), 4), "int32 and torch.int64.*from_intervals converts"),
        (lambda: AttentionMask(ZEROS[..., :0], ZEROS[..., :0], 4), "K of at least 1"),
        (lambda: AttentionMask(ZEROS, META, 4), "start is on 'cpu' and stop on 'meta'"),
        (lambda: AttentionMask(ZEROS, None, 4), "stop must be integers .*NoneType"),
        (lambda: AttentionMask.from_dense([[[True]]]), "dense mask must be bool .*list"),
        (lambda: AttentionMask.from_dense(torch.ones(1, 2, 2)), "dense mask must be bool .*float32"),
        (lambda: AttentionMask.from_mask_mod(lambda b, h, q, k: q >= k, 1, -2, 3), "query_length .*got -2"),
        (lambda: AttentionMask.from_mask_mod(lambda b, h, q, k: q >= k, None, 2, 3), "batch_size .*got None"),
        (lambda: causal(2, 3) & AttentionMask(META, META, 3), "different devices.*'cpu' & 'meta'"),
        (lambda: causal(2, 3) | AttentionMask(META, META, 3), r"different devices.*'cpu' \| 'meta'"),
        (lambda: causal(2, 3)[True], "index of a row must be integers, got bool True"),
        (lambda: causal(2, 3)[[True, False]], "index of a row must be integers, got list"),
        (lambda: causal(2, 3)[torch.tensor([True, False])], r"bool \(2,\); convert .*nonzero"),
        (lambda: causal(2, 3)["first"], "index of a row must be integers, got str 'first'"),
        (lambda: causal(2, 3)[torch.tensor(1)], r"integers \[R\], got torch.int64 \(\)"),
        (lambda: causal(2, 3).take_queries(torch.tensor([True, False, True])), "index of a query .*nonzero"),
        (
            lambda: causal(2, 3).take_queries(torch.tensor([0.0])),
            "query must be integers, got torch.float32",
        ),
        (lambda: causal(2, 3).take_queries([0, 1]), "index of a query must be integers, got list"),
        (lambda: causal(2, 3).take_queries(torch.zeros(1, 1, 1, dtype=torch.int64)), r"\[Q'\] or \[B, Q'\]"),
    ],
)
def test_refused_arguments(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: causal(2, 3)[[0, 2]], "row 2 is out of range for a mask that has 2"),
        (lambda: causal(2, 3)[torch.tensor([-3])], "row -3 is out of range"),
        (lambda: causal(2, 3).take_queries(torch.tensor([0, 3])), "query 3 is out of range for a mask that has 3"),
        (lambda: causal(2, 3).take_queries(torch.tensor([[0], [3]])), "query 3 is out of range"),
        (lambda: causal(2, 3).take_queries(torch.tensor([-1])), "query -1 is out of range"),
    ],
)
def test_indices_out_of_range(call, message: str) -> None:
    with pytest.raises(IndexError, match=message):
        call()


def test_indices_of_any_integer_dtype() -> None:
    """An index of uint8 selects by number: PyTorch would take it for a bool mask."""
    for dtype in (torch.uint8, torch.int32, torch.int64):
        index = torch.tensor([1, 0], dtype=dtype)
        assert causal(2, 3).take_queries(index).stop[0, :, 0].tolist() == [2, 1]
        assert causal(2, 3).take_queries(index[:, None]).stop[:, 0, 0].tolist() == [2, 1]
        assert causal(2, 3)[index].shape == (2, 3, 3)
    assert causal(2, 3)[-1].shape == (1, 3, 3) and causal(2, 3)[[]].shape == (0, 3, 3)
    assert [mask.shape for mask in causal(2, 3)] == [(1, 3, 3)] * 2  # iteration ends at IndexError
