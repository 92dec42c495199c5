import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sightline import Batch
from sightline.layers import GatedDeltaNet, RecurrentCache
from sightline.layers.recurrence import causal_convolution, gated_delta_rule
from sightline.masks import AttentionMask, causal, document
from sightline.masks.segments import number_segments
from tests.support.lowering import lowered

C = 64  # chunk size


def mask_of(document_ids: Tensor) -> AttentionMask:
    return causal(*document_ids.shape) & document(document_ids)


def ids_of(*rows: list[tuple[int, int]]) -> Tensor:
    """Return document ids int32 [B, S] from rows of (id, length)."""
    return torch.tensor([[i for i, length in row for _ in range(length)] for row in rows], dtype=torch.int32)


def test_document_starts_literal() -> None:
    ids = torch.tensor([[0, 0, 0, 1, 2, 2, -1, -1], [0, 1, 1, 1, 1, 1, 1, 1], [-1, -1, -1, -1, -1, -1, -1, -1]])
    mask = mask_of(ids.to(torch.int32))
    starts = number_segments(mask).diff(dim=1, prepend=torch.zeros(3, 1, dtype=torch.int64))
    assert starts.tolist() == [
        [1, 0, 0, 1, 1, 0, 1, 0],
        [1, 1, 0, 0, 0, 0, 0, 0],
        [1, 0, 0, 0, 0, 0, 0, 0],
    ]
    assert number_segments(mask).tolist()[0] == [1, 1, 1, 2, 3, 3, 4, 4]
    # With a cache: the last three of eight tokens. The first of them in row 0 continues document 2.
    assert number_segments(mask.take_queries(torch.tensor([5, 6, 7]))).tolist()[0] == [0, 1, 1]


@given(st.lists(st.integers(1, 9), min_size=1, max_size=12), st.integers(2, 16))
@settings(max_examples=50, deadline=None)
def test_document_starts_equal_batch_offsets(lengths: list[int], length: int) -> None:
    batch = Batch.from_documents([[1] * n for n in lengths], length=length)
    segments = number_segments(mask_of(batch.document_ids))
    starts = segments.diff(dim=1, prepend=torch.zeros(len(segments), 1)).flatten().nonzero()[:, 0]
    assert starts.tolist() == batch.document_offsets()[:-1].tolist()


def test_split_documents_are_an_error() -> None:
    ids = torch.tensor([[0, 0, 1, 1, 0, 0]], dtype=torch.int32)
    with pytest.raises(ValueError, match="one run of tokens each, got a mask of 2 intervals"):
        number_segments(mask_of(ids))


def reference_convolution(x: Tensor, weight: Tensor, ids: Tensor) -> Tensor:
    """One document at a time with F.conv1d."""
    y, conv_kernel = torch.zeros_like(x), weight.shape[1]
    for row in range(len(x)):
        for number in ids[row].unique():
            index = (ids[row] == number).nonzero()[:, 0]
            alone = F.pad(x[row, index].t(), (conv_kernel - 1, 0))
            y[row, index] = F.conv1d(alone[None], weight[:, None], groups=len(weight))[0].t()
    return y


@pytest.mark.parametrize("conv_kernel", [1, 2, 4])
def test_convolution_equals_reference(conv_kernel: int) -> None:
    torch.manual_seed(0)
    ids = ids_of([(0, 5), (1, 1), (2, 2), (3, 9), (-1, 3)], [(0, 1), (1, 1), (2, 18)])
    x = torch.randn(2, 20, 6, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(6, conv_kernel, dtype=torch.float64, requires_grad=True)
    y, expected = causal_convolution(x, weight, number_segments(mask_of(ids))), reference_convolution(x, weight, ids)
    torch.testing.assert_close(y, expected)
    upstream = torch.randn_like(y)
    grads, wanted = (torch.autograd.grad(out, (x, weight), upstream) for out in (y, expected))
    torch.testing.assert_close(grads, wanted)


def inputs(batch: int, length: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
    """Return q, k [B, S, 2, 5], v [B, S, 4, 3], decay and beta [B, S, 4]: two value heads share a key head."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(batch, length, heads, size, dtype=dtype) for heads, size in ((2, 5), (2, 5), (4, 3)))
    decay, beta = (torch.rand(batch, length, 4, dtype=dtype) for _ in range(2))
    return tuple(t.requires_grad_() for t in (q, F.normalize(k, dim=-1), v, -3 * decay.square(), beta))


def reference_delta_rule(
    q: Tensor, k: Tensor, v: Tensor, decay: Tensor, beta: Tensor, segments: Tensor, state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Definition of the gated delta rule, one token at a time."""
    q, k = (t.repeat_interleave(v.shape[2] // t.shape[2], dim=2) for t in (q, k))
    zero = v.new_zeros(*v.shape[::2], k.shape[-1], v.shape[-1])
    state = zero if state is None else state
    outputs, previous = [], torch.zeros_like(segments[:, 0])
    for t in range(v.shape[1]):
        state = torch.where((segments[:, t] == previous)[:, None, None, None], state, zero)
        previous = segments[:, t]
        state = state * decay[:, t, :, None, None].exp()
        stored = torch.einsum("bhde,bhd->bhe", state, k[:, t])
        state = state + torch.einsum("bh,bhd,bhe->bhde", beta[:, t], k[:, t], v[:, t] - stored)
        outputs.append(torch.einsum("bhde,bhd->bhe", state, q[:, t]))
    return torch.stack(outputs, dim=1), state


LAYOUTS = {
    "one document": ids_of([(0, 150)]),
    "one token": ids_of([(0, 1)], [(-1, 1)]),
    "less than a chunk": ids_of([(0, 20), (1, 1), (2, 9)], [(0, 1), (1, 1), (2, 28)]),
    "chunk ends": ids_of([(0, C), (1, C), (2, 22)], [(0, C - 1), (1, 1), (2, 1), (3, C - 2), (4, 23)]),
    "across chunks": ids_of([(0, 3), (1, 140), (2, 7)], [(0, 10), (1, 60), (2, 30), (-1, 50)]),
    "one-token documents": ids_of([(i, 1) for i in range(130)], [(0, 64), *((i, 1) for i in range(1, 67))]),
    "padding": ids_of([(-1, 100)], [(0, 70), (-1, 30)]),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("with_state", [False, True])
def test_chunked_rule_equals_reference(layout: str, with_state: bool) -> None:
    segments = number_segments(mask_of(LAYOUTS[layout]))
    rows, length = segments.shape
    tensors = inputs(rows, length)
    state = None
    if with_state:  # the first documents continue from the initial state
        segments = segments - 1
        state = torch.randn(rows, 4, 5, 3, dtype=torch.float64, requires_grad=True)
        tensors = (*tensors, state)
    got = gated_delta_rule(*tensors[:5], segments, state)
    expected = reference_delta_rule(*tensors[:5], segments, state)
    torch.testing.assert_close(got, expected, atol=1e-10, rtol=1e-10)
    upstream = [torch.randn_like(t) for t in expected]
    grads, wanted = (torch.autograd.grad(out, tensors, upstream) for out in (got, expected))
    torch.testing.assert_close(grads, wanted, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("start", [[0, 0], [0, 1]])
def test_one_token_with_a_state_equals_reference(start: list[int]) -> None:
    """A token that starts a document resets the state of its row."""
    segments = torch.tensor(start)[:, None]
    state = torch.randn(2, 4, 5, 3, dtype=torch.float64, requires_grad=True)
    tensors = (*inputs(2, 1), state)
    got = gated_delta_rule(*tensors[:5], segments, state)
    expected = reference_delta_rule(*tensors[:5], segments, state)
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-12, rtol=0)
    weights = [torch.randn_like(value) for value in got]
    grads = [torch.autograd.grad(values, tensors, weights, retain_graph=True) for values in (got, expected)]
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other, atol=1e-12, rtol=0)


def test_convolution_of_one_token_equals_reference() -> None:
    weight, past = torch.randn(3, 4, dtype=torch.float64), torch.randn(2, 3, 3, dtype=torch.float64)
    x = torch.randn(2, 1, 3, dtype=torch.float64)
    got = causal_convolution(x, weight, torch.tensor([[0], [1]]), past)
    full = torch.cat([past, x], dim=1)
    expected = reference_convolution(full, weight, torch.tensor([[0, 0, 0, 0], [0, 0, 0, 1]]))[:, -1:]
    torch.testing.assert_close(got, expected, atol=1e-12, rtol=0)


@given(st.lists(st.integers(1, 40), min_size=1, max_size=8), st.integers(1, 17))
@settings(max_examples=25, deadline=None)
def test_any_layout_and_chunk_size(lengths: list[int], chunk_size: int) -> None:
    segments = number_segments(mask_of(ids_of(list(enumerate(lengths)))))
    tensors = inputs(1, segments.shape[1])
    got, expected = (
        gated_delta_rule(*tensors, segments, chunk_size=chunk_size),
        reference_delta_rule(*tensors, segments),
    )
    torch.testing.assert_close(got, expected, atol=1e-10, rtol=1e-10)


def test_extreme_decay_is_finite_in_float32() -> None:
    """A decay of exp(-40) per token is exp(-2560) over a chunk, which underflows to 0."""
    segments = number_segments(mask_of(LAYOUTS["across chunks"]))
    q, k, v, decay, beta = inputs(2, 150, torch.float32)
    decay = torch.where(torch.rand(decay.shape) < 0.5, -40.0, 0.0).requires_grad_()
    got = gated_delta_rule(q, k, v, decay, beta, segments)
    expected = reference_delta_rule(*(t.double() for t in (q, k, v, decay, beta)), segments)
    torch.testing.assert_close(got, tuple(t.float() for t in expected), atol=1e-5, rtol=1e-4)
    grads = torch.autograd.grad(got[0].sum(), (q, k, v, decay, beta))
    assert all(grad.isfinite().all() for grad in grads)


@pytest.mark.parametrize("changed", [0, 63, 64, 75, 142])
def test_other_documents_are_bitwise_unchanged(changed: int) -> None:
    ids = ids_of([(0, 10), (1, 54), (2, 1), (3, 70), (4, 15)])
    segments = number_segments(mask_of(ids))
    others = (ids != ids[0, changed])[0]

    def outputs_and_grads(scale: float) -> list[Tensor]:
        tensors = [t.detach().clone() for t in inputs(1, 150, torch.float32)]
        for tensor in tensors:
            tensor[:, changed] *= scale
        leaves = [t.requires_grad_() for t in tensors]
        out, _ = gated_delta_rule(*leaves, segments)
        return [out.detach(), *torch.autograd.grad(out.square().sum(), leaves)]

    before, after = outputs_and_grads(1.0), outputs_and_grads(0.3)
    assert all(torch.equal(b[:, others], a[:, others]) for b, a in zip(before, after, strict=True))
    assert not torch.equal(before[0][:, ~others], after[0][:, ~others])


def make_layer() -> GatedDeltaNet:
    torch.manual_seed(0)
    layer = GatedDeltaNet(
        24, num_key_heads=2, num_value_heads=4, key_head_dim=8, value_head_dim=6, conv_kernel=4, norm_eps=1e-6
    )
    layer.init_weights(24**-0.5, 24**-0.5)
    return layer


def test_packed_equals_separate() -> None:
    layer, ids = make_layer(), LAYOUTS["across chunks"]
    x = torch.randn(2, 150, 24)
    y = layer(x, lowered(mask_of(ids), segments=True))
    for row in range(2):
        for number in ids[row].unique():
            index = (ids[row] == number).nonzero()[:, 0]
            alone = layer(
                x[row, index][None], lowered(mask_of(torch.zeros(1, len(index), dtype=torch.int32)), segments=True)
            )
            torch.testing.assert_close(y[row, index], alone[0], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("splits", [[1], [5, 6, 7, 8], [100], [64, 128]])
def test_cached_generation_equals_full_forward(splits: list[int]) -> None:
    """Also if a new document resets the state after a split, at token 70 of 150."""
    layer, mask = make_layer(), mask_of(ids_of([(0, 70), (1, 80)]))
    x = torch.randn(1, 150, 24)
    cache, parts = RecurrentCache(), []
    for start, end in zip([0, *splits], [*splits, 150], strict=True):
        part = mask_of(ids_of([(0, 70), (1, 80)])[:, :end]).take_queries(torch.arange(start, end))
        parts.append(layer(x[:, start:end], lowered(part, segments=True), None, cache))
    torch.testing.assert_close(torch.cat(parts, dim=1), layer(x, lowered(mask, segments=True)), atol=1e-5, rtol=1e-4)
    assert cache.state is not None and cache.state.shape == (1, 4, 8, 6)


def test_partial_row_without_cache_is_an_error() -> None:
    mask = causal(1, 8).take_queries(torch.arange(4, 8))
    with pytest.raises(ValueError, match="needs all tokens of a row, got a mask of 4 queries and 8 keys"):
        make_layer()(torch.randn(1, 4, 24), lowered(mask, segments=True))


def test_state_is_float32_under_autocast() -> None:
    layer, mask = make_layer(), mask_of(LAYOUTS["across chunks"])
    x = torch.randn(2, 150, 24)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x, lowered(mask, segments=True))
    assert y.dtype == torch.bfloat16
    expected = layer(x, lowered(mask, segments=True))
    assert (y - expected).abs().mean() < 0.02 * expected.abs().mean()  # 0.008; single elements differ by up to 0.17
