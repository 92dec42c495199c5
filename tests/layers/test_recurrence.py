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

C = 64  # tokens of a chunk


def mask_of(document_ids: Tensor) -> AttentionMask:
    return causal(*document_ids.shape) & document(document_ids)


def ids_of(*rows: list[tuple[int, int]]) -> Tensor:
    """Rows of (id, length): int32 [B, S]."""
    return torch.tensor([[i for i, length in row for _ in range(length)] for row in rows], dtype=torch.int32)


def test_document_begins_literal() -> None:
    ids = torch.tensor([[0, 0, 0, 1, 2, 2, -1, -1], [0, 1, 1, 1, 1, 1, 1, 1], [-1, -1, -1, -1, -1, -1, -1, -1]])
    mask = mask_of(ids.to(torch.int32))
    begins = number_segments(mask).diff(dim=1, prepend=torch.zeros(3, 1, dtype=torch.int64))
    assert begins.tolist() == [
        [1, 0, 0, 1, 1, 0, 1, 0],
        [1, 1, 0, 0, 0, 0, 0, 0],
        [1, 0, 0, 0, 0, 0, 0, 0],
    ]
    assert number_segments(mask).tolist()[0] == [1, 1, 1, 2, 3, 3, 4, 4]
    # With a cache: the last three tokens of all eight. The first of row 0 continues document 2.
    assert number_segments(mask.take_queries(torch.tensor([5, 6, 7]))).tolist()[0] == [0, 1, 1]


@given(st.lists(st.integers(1, 9), min_size=1, max_size=12), st.integers(2, 16))
@settings(max_examples=50, deadline=None)
def test_document_begins_agree_with_the_offsets_of_the_batch(lengths: list[int], length: int) -> None:
    batch = Batch.from_documents([[1] * n for n in lengths], length=length)
    segments = number_segments(mask_of(batch.document_ids))
    begins = segments.diff(dim=1, prepend=torch.zeros(len(segments), 1)).flatten().nonzero()[:, 0]
    assert begins.tolist() == batch.document_offsets()[:-1].tolist()


def test_documents_in_pieces_are_refused() -> None:
    ids = torch.tensor([[0, 0, 1, 1, 0, 0]], dtype=torch.int32)
    with pytest.raises(ValueError, match="one run of tokens each, got a mask of 2 intervals"):
        number_segments(mask_of(ids))


def slow_convolution(x: Tensor, weight: Tensor, ids: Tensor) -> Tensor:
    """Every document by itself, through torch's own convolution."""
    y, conv_kernel = torch.zeros_like(x), weight.shape[1]
    for row in range(len(x)):
        for number in ids[row].unique():
            index = (ids[row] == number).nonzero()[:, 0]
            alone = F.pad(x[row, index].t(), (conv_kernel - 1, 0))
            y[row, index] = F.conv1d(alone[None], weight[:, None], groups=len(weight))[0].t()
    return y


@pytest.mark.parametrize("conv_kernel", [1, 2, 4])
def test_convolution_is_that_of_each_document(conv_kernel: int) -> None:
    torch.manual_seed(0)
    ids = ids_of([(0, 5), (1, 1), (2, 2), (3, 9), (-1, 3)], [(0, 1), (1, 1), (2, 18)])
    x = torch.randn(2, 20, 6, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(6, conv_kernel, dtype=torch.float64, requires_grad=True)
    y, expected = causal_convolution(x, weight, number_segments(mask_of(ids))), slow_convolution(x, weight, ids)
    torch.testing.assert_close(y, expected)
    upstream = torch.randn_like(y)
    grads, wanted = (torch.autograd.grad(out, (x, weight), upstream) for out in (y, expected))
    torch.testing.assert_close(grads, wanted)


def inputs(batch: int, length: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
    """q, k [B, S, 2, 5], v [B, S, 4, 3], decay and beta [B, S, 4]: two value heads share a key head."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(batch, length, heads, size, dtype=dtype) for heads, size in ((2, 5), (2, 5), (4, 3)))
    decay, beta = (torch.rand(batch, length, 4, dtype=dtype) for _ in range(2))
    return tuple(t.requires_grad_() for t in (q, F.normalize(k, dim=-1), v, -3 * decay.square(), beta))


def slow_delta_rule(
    q: Tensor, k: Tensor, v: Tensor, decay: Tensor, beta: Tensor, segments: Tensor, memory: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The definition, token by token."""
    q, k = (t.repeat_interleave(v.shape[2] // t.shape[2], dim=2) for t in (q, k))
    empty = v.new_zeros(*v.shape[::2], k.shape[-1], v.shape[-1])
    memory = empty if memory is None else memory
    outputs, last = [], torch.zeros_like(segments[:, 0])
    for t in range(v.shape[1]):
        memory = torch.where((segments[:, t] == last)[:, None, None, None], memory, empty)
        last = segments[:, t]
        memory = memory * decay[:, t, :, None, None].exp()
        held = torch.einsum("bhde,bhd->bhe", memory, k[:, t])
        memory = memory + torch.einsum("bh,bhd,bhe->bhde", beta[:, t], k[:, t], v[:, t] - held)
        outputs.append(torch.einsum("bhde,bhd->bhe", memory, q[:, t]))
    return torch.stack(outputs, dim=1), memory


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
@pytest.mark.parametrize("remembers", [False, True])
def test_chunked_scan_is_the_rule_token_by_token(layout: str, remembers: bool) -> None:
    segments = number_segments(mask_of(LAYOUTS[layout]))
    rows, length = segments.shape
    tensors = inputs(rows, length)
    memory = None
    if remembers:  # the first documents continue what is remembered
        segments = segments - 1
        memory = torch.randn(rows, 4, 5, 3, dtype=torch.float64, requires_grad=True)
        tensors = (*tensors, memory)
    got = gated_delta_rule(*tensors[:5], segments, memory)
    expected = slow_delta_rule(*tensors[:5], segments, memory)
    torch.testing.assert_close(got, expected, atol=1e-10, rtol=1e-10)
    upstream = [torch.randn_like(t) for t in expected]
    grads, wanted = (torch.autograd.grad(out, tensors, upstream) for out in (got, expected))
    torch.testing.assert_close(grads, wanted, atol=1e-9, rtol=1e-9)


@given(st.lists(st.integers(1, 40), min_size=1, max_size=8), st.integers(1, 17))
@settings(max_examples=25, deadline=None)
def test_any_layout_and_any_size_of_chunks(lengths: list[int], chunk_size: int) -> None:
    segments = number_segments(mask_of(ids_of(list(enumerate(lengths)))))
    tensors = inputs(1, segments.shape[1])
    got, expected = (
        gated_delta_rule(*tensors, segments, chunk_size=chunk_size),
        slow_delta_rule(*tensors, segments),
    )
    torch.testing.assert_close(got, expected, atol=1e-10, rtol=1e-10)


def test_strong_and_absent_decay_stay_finite_and_close_in_float32() -> None:
    """A head may fade by exp(-40) in a token: from the begin of a chunk on that is exp(-2560), which is 0."""
    segments = number_segments(mask_of(LAYOUTS["across chunks"]))
    q, k, v, decay, beta = inputs(2, 150, torch.float32)
    decay = torch.where(torch.rand(decay.shape) < 0.5, -40.0, 0.0).requires_grad_()
    got = gated_delta_rule(q, k, v, decay, beta, segments)
    expected = slow_delta_rule(*(t.double() for t in (q, k, v, decay, beta)), segments)
    torch.testing.assert_close(got, tuple(t.float() for t in expected), atol=1e-5, rtol=1e-4)
    grads = torch.autograd.grad(got[0].sum(), (q, k, v, decay, beta))
    assert all(grad.isfinite().all() for grad in grads)


@pytest.mark.parametrize("changed", [0, 63, 64, 75, 142])
def test_not_one_bit_of_another_document_changes(changed: int) -> None:
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


def test_a_layer_gives_each_document_what_it_gives_it_alone() -> None:
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


@pytest.mark.parametrize("cuts", [[1], [5, 6, 7, 8], [100], [64, 128]])
def test_a_layer_continues_what_its_cache_remembers(cuts: list[int]) -> None:
    """Also where a new document begins after the cut, at token 70 of 150, and forgets it."""
    layer, mask = make_layer(), mask_of(ids_of([(0, 70), (1, 80)]))
    x = torch.randn(1, 150, 24)
    cache, parts = RecurrentCache(), []
    for begin, end in zip([0, *cuts], [*cuts, 150], strict=True):
        seen = mask_of(ids_of([(0, 70), (1, 80)])[:, :end]).take_queries(torch.arange(begin, end))
        parts.append(layer(x[:, begin:end], lowered(seen, segments=True), None, cache))
    torch.testing.assert_close(torch.cat(parts, dim=1), layer(x, lowered(mask, segments=True)), atol=1e-5, rtol=1e-4)
    assert cache.state is not None and cache.state.shape == (1, 4, 8, 6)


def test_a_part_of_a_row_without_a_cache_is_refused() -> None:
    mask = causal(1, 8).take_queries(torch.arange(4, 8))
    with pytest.raises(ValueError, match="walks over all tokens of a row, got a mask of 4 queries and 8 keys"):
        make_layer()(torch.randn(1, 4, 24), lowered(mask, segments=True))


def test_under_autocast_the_memory_stays_in_float32() -> None:
    layer, mask = make_layer(), mask_of(LAYOUTS["across chunks"])
    x = torch.randn(2, 150, 24)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x, lowered(mask, segments=True))
    assert y.dtype == torch.bfloat16
    expected = layer(x, lowered(mask, segments=True))
    assert (y - expected).abs().mean() < 0.02 * expected.abs().mean()  # 0.008; single numbers are up to 0.17 off
