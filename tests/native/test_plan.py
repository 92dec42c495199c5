"""Plans of masks, and calls of the C entry points with any arguments: an error code or a result, never a crash."""

import ctypes
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sightline.masks import AttentionMask, sliding_window
from sightline.native.kernel import HEADER, pack_intervals
from sightline.native.library import ARGUMENTS, get_library
from tests.support.native import needs_native
from tests.support.random_masks import expressions, packed, scattered_masks

pytestmark = needs_native
MAX_QUERIES = 64
OK, CODES = 0, set(range(5))


def unpack(mask: AttentionMask) -> tuple[Tensor, Tensor]:
    """Return the blocks [., 4] and chunks [., 2] of a mask."""
    numbers = pack_intervals(mask.start, mask.stop, mask.shape[2])
    *sizes, num_blocks, num_chunks = numbers[: HEADER.size // 4].tolist()
    assert sizes == [*mask.shape, mask.intervals]
    _, start, stop, blocks, chunks = numbers.split(
        [HEADER.size // 4, *[mask.start.numel()] * 2, 4 * num_blocks, 2 * num_chunks]
    )
    assert torch.equal(start, mask.start.flatten()) and torch.equal(stop, mask.stop.flatten())
    return blocks.view(-1, 4), chunks.view(-1, 2)


def check_plan(mask: AttentionMask) -> None:
    """Blocks contain each query once, in order; the chunks of a block contain all keys of its queries."""
    blocks, chunks = unpack(mask)
    covered = [(row, query) for row, first, end, _ in blocks.tolist() for query in range(first, end)]
    assert covered == [(row, query) for row in range(mask.shape[0]) for query in range(mask.shape[1])]
    visible = mask.to_dense()
    ends = [*blocks[1:, 3].tolist(), len(chunks)]
    for (row, first, end, first_chunk), last_chunk in zip(blocks.tolist(), ends, strict=True):
        assert 0 < end - first <= MAX_QUERIES
        listed = torch.zeros(mask.shape[2], dtype=torch.bool)
        previous = 0
        for start, stop in chunks[first_chunk:last_chunk].tolist():
            assert previous <= start < stop <= mask.shape[2]
            listed[start:stop], previous = True, stop
        needed = visible[row, first:end].any(dim=0)
        assert not (needed & ~listed).any()
        assert needed.any() == (last_chunk > first_chunk)


@settings(max_examples=100, deadline=None)
@given(st.one_of(scattered_masks(200), expressions(max_length=120).map(lambda pair: pair[0])))
def test_plans_cover_the_mask(mask: AttentionMask) -> None:
    check_plan(mask)


def test_plans_of_long_rows() -> None:
    check_plan(packed(64, 64, 1, 500, 33, padding=40))
    check_plan(sliding_window(2, 900, 100))
    dots = torch.zeros(1, 80, 2000, dtype=torch.bool)
    dots[:, :, ::40] = True
    check_plan(AttentionMask.from_dense(dots))  # more chunks than the first call provides for


def call_plan(start: Tensor, stop: Tensor, sizes: list[int], room: tuple[int, int]) -> tuple[int, list[int]]:
    """Return the code and the numbers of blocks and chunks; check that nothing outside the capacity is written."""
    counts = (ctypes.c_int64 * 2)()
    blocks, chunks = (
        torch.full((room[0] + 1, 4), -7, dtype=torch.int32),
        torch.full((room[1] + 1, 2), -7, dtype=torch.int32),
    )
    code = get_library().sightline_attention_plan(
        start.data_ptr(), stop.data_ptr(), *sizes, blocks.data_ptr(), room[0], chunks.data_ptr(), room[1],
        ctypes.cast(counts, ctypes.POINTER(ctypes.c_int64)),
        ctypes.cast(ctypes.addressof(counts) + 8, ctypes.POINTER(ctypes.c_int64)),
    )  # fmt: skip
    assert (blocks[-1] == -7).all() and (chunks[-1] == -7).all()
    return code, list(counts)


@pytest.mark.parametrize("seed", range(60))
def test_garbage_intervals_give_an_error_code(seed: int) -> None:
    """Random numbers, or a valid mask with one wrong number."""
    numbers = random.Random(seed)
    sizes = [numbers.randint(0, 2), numbers.randint(0, 150), numbers.randint(0, 150), numbers.randint(0, 4)]
    generator = torch.Generator().manual_seed(seed)
    span = numbers.choice([3, sizes[2] + 2, 2**31 - 1])
    start, stop = (
        torch.randint(-1 - span // 2 if seed % 2 else 0, span, (*sizes[:2], sizes[3]), generator=generator).int()
        for _ in range(2)
    )
    code, _ = call_plan(start, stop, sizes, (numbers.randint(0, 9), numbers.randint(0, 9)))
    valid = ((start >= 0) & (start <= stop) & (stop <= sizes[2])).all()
    assert code in CODES and (valid or code == 2)
    for bad in ([-1, *sizes[1:]], [*sizes[:3], -1], [*sizes[:2], -5, sizes[3]], [2**40, *sizes[1:]]):
        assert call_plan(start, stop, bad, (0, 0))[0] == 1


class Call:
    """Buffers and arguments of a call of the C entry points, as a list of the fields of `sightline_attention`."""

    SIZES = slice(0, 9)
    POINTERS = (11, 12, 13, 15, 17, 18, 22, 26, 30, 34, 35, 39, 43, 47, 51)
    PLAN = (14, 16)

    def __init__(self, mask: AttentionMask, dim: int = 4, heads: int = 2, kv_heads: int = 1) -> None:
        rows, queries, keys = mask.shape
        self.blocks, self.chunks = (x.clone() for x in unpack(mask))
        self.start, self.stop = mask.start.clone(), mask.stop.clone()
        q, out, d_out, d_q = (torch.randn(rows, heads, queries, dim) for _ in range(4))
        k, v, d_k, d_v = (torch.randn(rows, kv_heads, keys, dim) for _ in range(4))
        lse, sinks, d_sinks = torch.zeros(rows, heads, queries), torch.zeros(heads), torch.zeros(heads)
        self.buffers = [q, k, v, out, d_out, d_q, d_k, d_v, lse, sinks, d_sinks]

        def pointer(x: Tensor) -> list[int]:
            return [x.data_ptr(), *x.stride()[:3]]

        self.fields: list[float] = [
            rows, queries, keys, heads, kv_heads, dim, dim, mask.intervals, 0, 0.5, 0.0,
            self.start.data_ptr(), self.stop.data_ptr(), self.blocks.data_ptr(), len(self.blocks),
            self.chunks.data_ptr(), len(self.chunks), sinks.data_ptr(),
            *pointer(q), *pointer(k), *pointer(v), *pointer(out), lse.data_ptr(),
            *pointer(d_out), *pointer(d_q), *pointer(d_k), *pointer(d_v), d_sinks.data_ptr(),
        ]  # fmt: skip

    def codes(self) -> tuple[int, int]:
        library, arguments = get_library(), ARGUMENTS.pack(*self.fields)
        return library.sightline_attention_forward(arguments), library.sightline_attention_backward(arguments)


MASKS = {
    "documents": packed(70, 1, 30, padding=3),
    "window": sliding_window(2, 90, 5),
    "scattered": AttentionMask.from_dense(torch.rand(1, 70, 40, generator=torch.Generator().manual_seed(0)) < 0.3),
}


@pytest.mark.parametrize("name", MASKS)
def test_one_wrong_number_never_crashes(name: str) -> None:
    """A changed interval or plan gives an error code, or is another valid one."""
    numbers, refused = random.Random(0), 0
    assert Call(MASKS[name]).codes() == (OK, OK)
    values = (-(2**31), -1, 0, 1, 5, 63, 64, 65, 89, 90, 91, 1000, 2**31 - 1)
    for _ in range(300):
        call = Call(MASKS[name])
        target = numbers.choice([call.start, call.stop, call.blocks, call.chunks]).view(-1)
        target[numbers.randrange(len(target))] = numbers.choice(values)
        codes = call.codes()
        assert set(codes) <= CODES
        refused += codes != (OK, OK)
    assert refused > 100


@pytest.mark.parametrize("seed", range(40))
def test_garbage_plans_give_an_error_code(seed: int) -> None:
    numbers = random.Random(seed)
    call = Call(MASKS[numbers.choice(list(MASKS))])
    for target in (call.blocks, call.chunks):
        if numbers.random() < 0.7:
            target.random_(*numbers.choice([(-5, 100), (0, 3), (-(2**31), 2**31 - 1)]))
    assert set(call.codes()) <= CODES
    for field in Call.PLAN:
        call = Call(MASKS["documents"])
        call.fields[field] += numbers.choice([-1, -100]) if seed % 2 else -1
        assert call.codes() == (3, 3)


def test_wrong_sizes_and_missing_pointers_give_an_error_code() -> None:
    mask = MASKS["documents"]
    for field in range(Call.SIZES.start, Call.SIZES.stop):
        for value in (-1, -(2**62), 2**62):
            call = Call(mask)
            call.fields[field] = value
            assert all(code in CODES - {OK} for code in call.codes()), (field, value)
    for fields in ((0, 1), (0, 2, 3, 4), (0, 1, 3, 5, 6), range(8)):  # whose product overflows
        call = Call(mask)
        for field in fields:
            call.fields[field] = 2**31 - 1
        assert call.codes() == (1, 1), fields
    for field in Call.POINTERS:
        call = Call(mask)
        call.fields[field] = 0
        forward, backward = call.codes()
        optional = field in (17, 51)  # without sinks, their gradient is not written
        assert forward in CODES and backward in CODES and (optional or backward != OK), field
    call = Call(mask)
    call.fields[4] = 0
    assert call.codes() == (1, 1)
    assert get_library().sightline_native_error(99) == b"unknown error"
