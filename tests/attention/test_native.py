"""Outputs and gradients of the native backend against attention with the full score matrix in float64."""

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sightline.attention import attend, check_backend, lower
from sightline.attention import native as native_module
from sightline.masks import AttentionMask, causal, document, sliding_window
from sightline.native.library import instruction_set, select_instruction_set, supported_instruction_sets
from tests.support.native import FLOAT32, assert_equals_dense, dense, native, needs_native, random_inputs
from tests.support.random_masks import documents, expressions, packed, scattered_masks

pytestmark = needs_native
HEADS = [(1, 1), (2, 1), (4, 2), (3, 3), (6, 1)]
DIMS = [(8, 8), (1, 1), (5, 5), (16, 8), (24, 40), (17, 3)]


def random_sinks(heads: int) -> Tensor:
    return torch.linspace(-2, 2, heads).requires_grad_()


@settings(max_examples=60, deadline=None)
@given(
    expressions(max_length=50),
    st.sampled_from(HEADS),
    st.sampled_from(DIMS),
    st.booleans(),
    st.sampled_from([None, 2.0]),
    st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_equals_dense_attention_under_any_mask(pair, heads, dims, with_sinks, softcap, dtype) -> None:
    mask, _ = pair
    sinks = random_sinks(heads[0]) if with_sinks else None
    assert_equals_dense(mask, random_inputs(mask, heads, dims, dtype=dtype), sinks, softcap)


@settings(max_examples=40, deadline=None)
@given(scattered_masks(90), st.sampled_from(HEADS), st.booleans())
def test_equals_dense_attention_with_other_queries_than_keys(mask, heads, with_sinks) -> None:
    assert_equals_dense(mask, random_inputs(mask, heads), random_sinks(heads[0]) if with_sinks else None)


@pytest.mark.parametrize("dim", [1, 5, 24, 40, 64, 80, 96, 128, 192, 256])
def test_every_head_dim(dim: int) -> None:
    mask = packed(70, 1, 60, 3, padding=4)
    for value_dim in (dim, dim + 3, max(1, dim // 2)):
        assert_equals_dense(mask, random_inputs(mask, (2, 1), (dim, value_dim)))


@pytest.mark.parametrize("intervals", [1, 2, 3, 5, 8, 16, 33, 64])
def test_any_number_of_intervals(intervals: int) -> None:
    """Queries have up to `intervals` runs of keys, at random places; every fifth query has none."""
    keys, generator = 4 * intervals + 30, torch.Generator().manual_seed(intervals)
    visible = torch.zeros(2, 70, keys, dtype=torch.bool)
    for row, query in torch.cartesian_prod(torch.arange(2), torch.arange(70)).tolist():
        number = 0 if query % 5 == 3 else intervals if query == 0 else 1 + query % intervals
        edges = torch.randperm(keys + 1, generator=generator)[: 2 * number].sort().values.tolist()
        for start, stop in zip(edges[::2], edges[1::2], strict=True):
            visible[row, query, start:stop] = True
    mask = AttentionMask.from_dense(visible)
    assert mask.intervals == intervals
    assert_equals_dense(mask, random_inputs(mask), random_sinks(4))


def long_masks() -> dict[str, AttentionMask]:
    length = 700
    dots = torch.zeros(1, 100, length, dtype=torch.bool)
    dots[:, ::3, 5::90] = True
    far = torch.zeros(1, 65, 3000, dtype=torch.bool)
    far[:, :, 2:7], far[:, 3:, 2990:] = True, True
    return {
        "documents": packed(1, 200, 1, 1, 350, 20, 100, padding=27),
        "64 tokens": packed(*[64] * 8),
        "both directions": document(documents(300, 1, 400)),
        "window": sliding_window(1, length, 70),
        "wide window": sliding_window(1, length, 500),
        "causal": causal(2, length),
        "shard": causal(1, length).take_queries(torch.arange(1, length, 3)),
        "one query": causal(1, length).take_queries(torch.tensor([length - 1])),
        "two thirds of the queries are fully masked": AttentionMask.from_dense(dots),
        "distant keys": AttentionMask.from_dense(far),
    }


@pytest.mark.parametrize("name", long_masks())
def test_long_masks(name: str) -> None:
    mask = long_masks()[name]
    assert_equals_dense(mask, random_inputs(mask, (4, 2), (16, 16)), random_sinks(4))
    assert_equals_dense(mask, random_inputs(mask, (2, 1), (16, 24), dtype=torch.bfloat16), softcap=1.5)


def test_large_scores_do_not_overflow() -> None:
    """Scores of several hundreds; their softmax is a choice of one key."""
    mask = packed(40, 30)
    for factor in (30.0, -30.0):
        leaves = [(factor * x.detach()).requires_grad_() for x in random_inputs(mask)[:2]]
        leaves.append(random_inputs(mask)[2])
        out, expected = native(*leaves, mask), dense(*leaves, mask)
        torch.testing.assert_close(out.double(), expected, rtol=1e-3, atol=1e-3)
        assert all(x.isfinite().all() for x in torch.autograd.grad(out.sum(), leaves))


@pytest.mark.parametrize(
    ("rows", "queries", "keys"), [(0, 8, 8), (1, 1, 1), (2, 0, 5), (2, 3, 0), (0, 0, 0), (1, 3, 9)]
)
def test_sizes_of_zero_and_one(rows: int, queries: int, keys: int) -> None:
    intervals = torch.zeros(rows, queries, 1, dtype=torch.int32)
    mask = AttentionMask(intervals, intervals + min(1, keys), keys)
    out, d_q, d_k, d_v, d_sinks = assert_equals_dense(mask, random_inputs(mask), random_sinks(4))
    assert out.shape == (rows, 4, queries, 8) and d_q.shape == out.shape and d_sinks.shape == (4,)
    assert d_k.shape == d_v.shape == (rows, 2, keys, 8)


def test_strided_inputs() -> None:
    """Views as layers make them, and views whose last dimension is not contiguous."""
    mask, generator = packed(20, 1, 40, 2), torch.Generator().manual_seed(0)
    size, rows, length = 8, 1, 63

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    fused = random(rows, length, 8, size)  # 4 query heads, 2 key heads, 2 value heads
    interleaved = random(rows, length, 4, size, 3)
    padded = random(rows, 4, length + 5, size + 3)
    views = {
        "fused": [x.transpose(1, 2) for x in fused.split([4, 2, 2], dim=2)],
        "contiguous": [random(rows, 4, length, size) for _ in range(3)],
        "interleaved": [x.transpose(1, 2) for x in interleaved.unbind(-1)],
        "transposed": [random(rows, 4, size, length).mT for _ in range(3)],
        "narrow": [padded[:, :, 2 : length + 2, 1 : size + 1] for _ in range(3)],
        "expanded": [random(1, 1, length, size).expand(1, 4, -1, -1) for _ in range(3)],
        "every second": [random(rows, 4, length, 2 * size)[..., ::2] for _ in range(3)],
        "reversed heads": [random(rows, length, 4, size).transpose(1, 2).flip(1) for _ in range(3)],
    }
    for name, tensors in views.items():
        leaves = [x.detach().requires_grad_() for x in tensors]
        assert [x.stride() for x in leaves] == [x.stride() for x in tensors], name
        found = assert_equals_dense(mask, leaves)
        assert found[0].transpose(1, 2).is_contiguous(), name
        out = native(*leaves, mask)
        torch.testing.assert_close(
            torch.autograd.grad(out.sum(), leaves), torch.autograd.grad(dense(*leaves, mask).float().sum(), leaves),
            rtol=2e-5, atol=2e-5,
        )  # fmt: skip


def test_padding_gives_exact_zeros_and_zero_gradients() -> None:
    ids = torch.tensor([[0] * 5 + [-1] * 3, [-1] * 8])
    mask, padding = causal(2, 8) & document(ids), ids < 0
    found = assert_equals_dense(mask, random_inputs(mask), random_sinks(4))
    for x in found[:4]:
        assert torch.equal(x.transpose(1, 2)[padding], torch.zeros_like(x.transpose(1, 2)[padding]))


def results(mask: AttentionMask, leaves: list[Tensor]) -> list[Tensor]:
    sinks = random_sinks(leaves[0].shape[1])
    out = native(*leaves, mask, sinks=sinks)
    cotangent = torch.randn(out.shape, generator=torch.Generator().manual_seed(9)).to(out.dtype)
    return [out, *torch.autograd.grad(out, [*leaves, sinks], cotangent)]


@pytest.mark.parametrize("value", [3.0, 1e4, float("inf"), -float("inf"), float("nan")])
def test_no_leakage_between_documents(value: float) -> None:
    """Perturb one token: outputs and gradients of the other documents stay bitwise equal."""
    ids = documents(3, 1, 200, 5, 1, 40, 2, 17, 31)
    length = ids.shape[1]
    for mask in (causal(1, length) & document(ids), sliding_window(1, length, 12) & document(ids), document(ids)):
        leaves = random_inputs(mask)
        before = results(mask, leaves)[:4]
        for token in (0, 3, 100, 206, 230, length - 1):
            changed = [x.detach().clone() for x in leaves]
            for x in changed:
                x[:, :, token] += value
            after = results(mask, [x.requires_grad_() for x in changed])[:4]
            others = (ids != ids[0, token])[0]
            for one, other in zip(before, after, strict=True):
                assert torch.equal(one[:, :, others], other[:, :, others])
            assert not torch.equal(before[0][:, :, ~others], after[0][:, :, ~others])


@pytest.fixture
def two_threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("heads", [(4, 2), (2, 1), (1, 1)])
def test_two_threads_are_deterministic(two_threads: None, heads: tuple[int, int]) -> None:
    mask = packed(100, 1, 150, 30, padding=5)
    leaves = random_inputs(mask, heads)
    assert_equals_dense(mask, leaves, random_sinks(heads[0]))
    first = results(mask, leaves)
    for _ in range(5):
        assert all(torch.equal(one, other) for one, other in zip(first, results(mask, leaves), strict=True))
    torch.set_num_threads(1)
    one_thread = results(mask, leaves)
    assert all(torch.equal(one, other) for one, other in zip(one_thread, results(mask, leaves), strict=True))
    torch.testing.assert_close(one_thread, first, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", supported_instruction_sets() if native_module.why_missing() is None else [])
def test_every_instruction_set_of_this_processor(name: str) -> None:
    used = instruction_set()
    select_instruction_set(name)
    try:
        assert instruction_set() == name
        for mask_name in ("documents", "window", "distant keys"):
            mask = long_masks()[mask_name]
            for dtype in (torch.float32, torch.bfloat16):
                assert_equals_dense(mask, random_inputs(mask, (2, 1), (24, 40), dtype=dtype), random_sinks(2), 2.0)
                assert_equals_dense(mask, random_inputs(mask, (2, 2), (64, 64), dtype=dtype))
    finally:
        select_instruction_set(used)


def test_auto_selects_native_on_a_cpu() -> None:
    mask = packed(5, 9)
    for backend in ("auto", "sdpa"):
        chosen = lower(mask, device="cpu", dtype=torch.float32, training=True, backend=backend)
        assert chosen.backend.name == "native"
    leaves = random_inputs(mask)
    assert torch.equal(attend(*leaves, mask), native(*leaves, mask))
    assert torch.equal(attend(*leaves, mask, scale=0.7), native(*leaves, mask, scale=0.7))
    double = lower(mask, device="cpu", dtype=torch.float64, training=True)
    assert double.backend.name == "tiled"
    assert double.reason.startswith("native computes float32 and bfloat16, got torch.float64")


def test_without_the_library_auto_selects_tiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native_module, "why_missing", lambda: "no C++ compiler was found; run `make setup`")
    chosen = lower(causal(1, 4), device="cpu", dtype=torch.float32, training=True)
    assert chosen.backend.name == "tiled"
    assert chosen.reason.startswith("native is not built: no C++ compiler was found; run `make setup`; it trains")
    with pytest.raises(ValueError, match=r"native is not built.*make setup.*supported backends: sdpa, tiled, ref"):
        check_backend("native", FLOAT32)
