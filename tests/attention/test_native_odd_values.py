"""NaN, infinity and large numbers in the native backend: they stay where a dense computation would have them."""

import pytest
import torch
from torch import Tensor

from sightline.attention import attend
from sightline.masks import AttentionMask, sliding_window
from sightline.native.library import instruction_set, select_instruction_set, supported_instruction_sets
from tests.support.native import assert_equals_dense, dense, native, needs_native, random_inputs
from tests.support.random_masks import packed

pytestmark = needs_native
ODD = [float("nan"), float("inf"), -float("inf")]
LENGTHS = (3, 1, 70, 5, 2)
"""Documents, followed by padding."""
SIZE = sum(LENGTHS) + 4


def document_of(token: int) -> Tensor:
    """Return a bool [S]: the tokens of the document of `token`."""
    ids = torch.repeat_interleave(torch.arange(len(LENGTHS) + 1), torch.tensor([*LENGTHS, 4]))
    return ids == ids[token]


def gradients(leaves: list[Tensor], sinks: Tensor, mask: AttentionMask, cotangent: Tensor) -> list[Tensor]:
    out = native(*leaves, mask, sinks=sinks)
    return list(torch.autograd.grad(out, [*leaves, sinks], cotangent))


@pytest.mark.parametrize("value", ODD)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cotangents_reach_their_own_document_only(value: float, dtype: torch.dtype) -> None:
    mask, sinks = packed(*LENGTHS, padding=4), torch.linspace(-2, 2, 4).requires_grad_()
    leaves = random_inputs(mask, dtype=dtype)
    cotangent = torch.randn(1, 4, SIZE, 8, generator=torch.Generator().manual_seed(0)).to(dtype)
    before = gradients(leaves, sinks, mask, cotangent)
    for token in (0, 3, 40, SIZE - 5, SIZE - 1):
        changed = cotangent.clone()
        changed[:, :, token, 2] = value
        after = gradients(leaves, sinks, mask, changed)
        others, is_padding = ~document_of(token), token == SIZE - 1
        for one, other in zip(before[:3], after[:3], strict=True):
            assert torch.equal(one[:, :, others], other[:, :, others])
            assert torch.equal(one, other) == is_padding
        assert torch.equal(before[3], after[3]) == is_padding, "padding has no part in the gradient of the sinks"


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("with_sinks", [False, True])
@pytest.mark.parametrize("value", ODD)
def test_outputs_are_nan_where_the_reference_is(value: float, with_sinks: bool, softcap: float | None) -> None:
    """NaN in a visible token is not lost; scores that are all -inf give NaN, but zeros beside a sink."""
    mask, sinks = packed(*LENGTHS, padding=4), torch.zeros(4) if with_sinks else None
    clean = [x.detach().abs() for x in random_inputs(mask)]
    for changed in range(3):
        for token in (0, 3, 40, SIZE - 1):
            leaves = [x.clone() for x in clean]
            leaves[changed][:, :, token] = value
            found, expected, before = (
                attend(*inputs, mask, backend=backend, sinks=sinks, softcap=softcap)
                for inputs, backend in ((leaves, "native"), (leaves, "reference"), (clean, "native"))
            )
            # The reference multiplies NaN in hidden keys by 0, so compare with it only where the token is visible.
            visible = mask.to_dense()[0, :, token]
            if changed == 0:
                visible = torch.arange(SIZE) == token
            torch.testing.assert_close(
                found[:, :, visible], expected[:, :, visible], equal_nan=True, rtol=2e-5, atol=2e-5
            )
            assert torch.equal(found[:, :, ~visible], before[:, :, ~visible])


@pytest.mark.parametrize("softcap", [0.5, 50.0, 1e4])
def test_soft_caps_of_any_size(softcap: float) -> None:
    """A large soft cap multiplies tanh of small numbers, which must be exact relative to their size."""
    mask = packed(*LENGTHS)
    for name in supported_instruction_sets():
        used = instruction_set()
        select_instruction_set(name)
        try:
            assert_equals_dense(mask, random_inputs(mask), torch.zeros(4).requires_grad_(), softcap)
        finally:
            select_instruction_set(used)


@pytest.mark.parametrize("logit", [-1e4, -50.0, 50.0, 1e4])
def test_large_sinks(logit: float) -> None:
    """A sink far above the scores takes all weight; one far below them takes none."""
    mask = packed(*LENGTHS, padding=4)
    sinks = (torch.linspace(-2, 2, 4) + logit).requires_grad_()
    out, *rest = assert_equals_dense(mask, random_inputs(mask), sinks)
    assert all(x.isfinite().all() for x in (out, *rest))
    assert (out.abs().max() < 1e-10) == (logit > 0)


def test_long_sums_are_exact() -> None:
    """Sums of 50,000 weights, in chunks."""
    mask = AttentionMask.from_intervals(torch.zeros(1, 2, 1).int(), torch.full((1, 2, 1), 50_000), 50_000)
    leaves = random_inputs(mask, (1, 1), (4, 4))
    values = leaves[2].detach().abs().requires_grad_()
    out, expected = (f(*leaves[:2], values, mask).double() for f in (native, dense))
    torch.testing.assert_close(out, expected, rtol=2e-5, atol=0)


@pytest.mark.parametrize("intervals", [1000, 3000])
def test_thousands_of_intervals(intervals: int) -> None:
    start = (2 * torch.arange(intervals, dtype=torch.int32)).expand(1, 3, -1).contiguous()
    mask = AttentionMask(start, start + 1, 2 * intervals)
    assert_equals_dense(mask, random_inputs(mask, (2, 1)), torch.zeros(2).requires_grad_())


@pytest.mark.parametrize("group", [8, 9, 17, 64])
def test_many_query_heads_of_one_key_head(group: int) -> None:
    mask = packed(70, 3)
    for kv_heads in (1, 2):
        leaves = random_inputs(mask, (kv_heads * group, kv_heads), (5, 16))
        assert_equals_dense(mask, leaves, torch.linspace(-1, 1, kv_heads * group).requires_grad_())


@pytest.mark.slow
def test_a_million_tokens_and_more_than_2_31_elements() -> None:
    """Equal to attention over the last tokens alone."""
    for tokens, stride in ((1_000_000, 8), (60_000, 40_000)):
        leaves = []
        for seed in range(3):
            x = torch.empty(tokens * stride, dtype=torch.bfloat16).as_strided((1, 1, tokens, 8), (0, 0, stride, 1))
            leaves.append(x.copy_(torch.randn(x.shape, generator=torch.Generator().manual_seed(seed))).requires_grad_())
        found, expected = [], []
        for results, start in ((found, 0), (expected, tokens - 500)):
            parts = [x[:, :, start:] for x in leaves]
            out = native(*parts, sliding_window(1, tokens - start, 8))
            results += [x[:, :, -300:] for x in (out, *torch.autograd.grad(out.float().square().sum(), parts))]
        torch.testing.assert_close(found, expected)
