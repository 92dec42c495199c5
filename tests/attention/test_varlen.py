"""The varlen backend. Its two kernels run on CUDA only; here plain implementations replace them."""

import sys

import pytest
import torch
import torch.nn.attention.varlen
from torch import Tensor

from sightline.attention import KernelRequirements, lower, varlen
from sightline.masks import AttentionMask, causal, document, prefix_lm, sliding_window
from tests.support.attention import inputs, results


def scores_of(q: Tensor, k: Tensor, offsets: Tensor, scale: float, window: list[int]) -> Tensor:
    """Masked scores [H, N, N] of concatenated sequences, from q [N, H, D] and k [N, G, D]."""
    number = torch.bucketize(torch.arange(len(q)), offsets[1:].long(), right=True)
    index = torch.arange(len(q))
    visible = number[:, None] == number
    left, right = window
    if left >= 0:
        visible &= index[:, None] - index <= left
    if right >= 0:
        visible &= index - index[:, None] <= right
    keys = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    return (torch.einsum("qhd,khd->hqk", q, keys) * scale).masked_fill(~visible, float("-inf"))


def forward_kernel(q, k, v, offsets, _, longest, __, causal_, scale, window, gqa):
    assert q.shape[2] == k.shape[2] == v.shape[2] and q.shape[2] % 8 == 0
    scores = scores_of(q, k, offsets, scale, window)
    values = v.repeat_interleave(q.shape[1] // v.shape[1], dim=1)
    return torch.einsum("hqk,khd->qhd", scores.softmax(-1), values), scores.logsumexp(-1), None


def backward_kernel(d_out, q, k, v, out, lse, offsets, _, longest, __, causal_, rng, scale, window):
    """Backward of FlashAttention: weights recomputed from the given log-sum-exp, delta from the output."""
    group = q.shape[1] // k.shape[1]
    weights = (scores_of(q, k, offsets, scale, window) - lse[..., None]).exp()
    keys, values = (x.repeat_interleave(group, dim=1) for x in (k, v))
    delta = (d_out * out).sum(-1).mT[..., None]
    d_scores = weights * (torch.einsum("qhd,khd->hqk", d_out, values) - delta) * scale
    d_k = torch.einsum("hqk,qhd->khd", d_scores, q).unflatten(1, (-1, group)).sum(2)
    d_v = torch.einsum("hqk,qhd->khd", weights, d_out).unflatten(1, (-1, group)).sum(2)
    return torch.einsum("hqk,khd->qhd", d_scores, keys), d_k, d_v


class Kernels:
    _varlen_attn = staticmethod(forward_kernel)
    _varlen_attn_backward = staticmethod(backward_kernel)


@pytest.fixture
def kernels_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.ops, "torch_attn", Kernels)
    monkeypatch.setattr(varlen.Varlen, "supports", lambda self, requirements: None)

    def varlen_attn(q, k, v, offsets, _, longest, __, *, scale, window_size, enable_gqa):
        return forward_kernel(q, k, v, offsets, _, longest, __, False, scale, list(window_size), enable_gqa)[0]

    monkeypatch.setattr(torch.nn.attention.varlen, "varlen_attn", varlen_attn)


@pytest.mark.parametrize("with_sinks", [False, True])
@pytest.mark.parametrize(("size", "value_dim"), [(8, 8), (8, 4), (12, 20)])
def test_varlen_equals_reference_with_padding_and_sinks(
    kernels_on_a_cpu: None, with_sinks: bool, size: int, value_dim: int
) -> None:
    ids = torch.tensor([[0] * 7 + [1] + [2] * 12, [0] * 5 + [1] * 9 + [-1] * 6])
    sinks = torch.tensor([0.5, -1.0, 2.0, 0.0], dtype=torch.float64).requires_grad_() if with_sinks else None
    for mask in (causal(2, 20) & document(ids), sliding_window(2, 20, 4) & document(ids), document(ids)):
        leaves = inputs(mask, 4, 2, size=size, value_dim=value_dim)
        actual, expected = (results(backend, mask, leaves, sinks) for backend in ("varlen", "reference"))
        for one, other in zip(actual, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


def test_auto_on_cuda_prefers_varlen_and_reports_why_not(
    kernels_on_a_cpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = sys.modules["sightline.attention.attend"]
    monkeypatch.setitem(module.AUTO, "cpu", module.AUTO["cuda"])  # the CPU replaces CUDA
    positions = torch.arange(8)[None]
    packed = causal(1, 8) & document(torch.zeros(1, 8, dtype=torch.int32))
    prefix = prefix_lm(positions, torch.full_like(positions, 3)) | causal(1, 8)
    lowered = [lower(mask, device="cpu", dtype=torch.bfloat16, training=False) for mask in (packed, prefix)]
    assert [one.backend.name for one in lowered] == ["varlen", "flex"]
    assert "at most one window" in lowered[0].reason and "none of these" in lowered[1].reason


def test_the_layout_is_built_once_per_lowering(kernels_on_a_cpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    original = AttentionMask.to_varlen
    monkeypatch.setattr(AttentionMask, "to_varlen", lambda mask: calls.append(mask) or original(mask))
    lower(causal(1, 8), device="cpu", dtype=torch.bfloat16, training=True, backend="varlen")
    assert len(calls) == 1


def test_varlen_supports_half_precision_on_cuda() -> None:
    cuda = torch.device("cuda")
    assert varlen.Varlen().supports(KernelRequirements(device=cuda, dtype=torch.bfloat16, training=True)) is None
    assert "float32" in str(varlen.Varlen().supports(KernelRequirements(device=cuda, dtype=torch.float32)))
