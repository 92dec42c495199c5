"""Arguments of `attend` that PyTorch's scaled_dot_product_attention accepts give its result; others a clear error."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sightline.attention import attend, lower
from sightline.masks import AttentionMask, causal, document, sliding_window
from tests.support.attention import fast_backends, inputs

BACKENDS = ["reference", *fast_backends()]
LENGTH, HEADS, SIZE = 40, 2, 8
MASK = sliding_window(1, LENGTH, 9) & document((torch.arange(LENGTH) // 15)[None])


def sdpa(q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask = MASK, scale: float | None = None) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask.to_dense().unsqueeze(1), scale=scale)


def qkv(dtype: torch.dtype = torch.float32, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(1, HEADS, LENGTH, SIZE, generator=generator).to(dtype) for _ in range(3)]


def transposed(x: Tensor) -> Tensor:
    return x.mT.contiguous().mT


def every_other_channel(x: Tensor) -> Tensor:
    return torch.stack([x, x + 1], dim=-1).flatten(-2)[..., ::2]


def interleaved(x: Tensor) -> Tensor:
    """One of q, k, v in a tensor [B, S, H, D, 3]."""
    return torch.stack([x, x + 1, x + 2], dim=-1).transpose(1, 2).contiguous().transpose(1, 2)[..., 0]


def one_head(x: Tensor) -> Tensor:
    return x[:, :1].expand(-1, HEADS, -1, -1)


def one_channel(x: Tensor) -> Tensor:
    return x[..., :1].expand(-1, -1, -1, SIZE)


LAYOUTS: list[Callable[[Tensor], Tensor]] = [transposed, every_other_channel, interleaved, one_head, one_channel]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("argument", ["q", "k", "v", "all", "cotangent"])
def test_any_strides_give_the_result_of_sdpa(backend: str, layout: Callable, argument: str) -> None:
    leaves = [x.requires_grad_() for x in qkv()]
    cotangent = layout(torch.randn(1, HEADS, LENGTH, SIZE)) if argument == "cotangent" else torch.randn_like(leaves[0])
    outcomes = []
    for function in (sdpa, lambda *x: attend(*x, MASK, backend=backend)):
        tensors = [layout(x) if argument in (name, "all") else x for name, x in zip("qkv", leaves, strict=True)]
        out = function(*tensors)
        outcomes.append([out, *torch.autograd.grad(out, leaves, cotangent)])
    for expected, actual in zip(*outcomes, strict=True):
        torch.testing.assert_close(actual, expected, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("scale", [-0.7, 0.0, 1, 1e-4])
@pytest.mark.parametrize("mask", [MASK, causal(1, LENGTH)], ids=["window", "causal"])
def test_any_scale_gives_the_result_of_sdpa(backend: str, scale: float, mask: AttentionMask) -> None:
    leaves = [x.requires_grad_() for x in qkv()]
    outs = sdpa(*leaves, mask, scale=scale), attend(*leaves, mask, backend=backend, scale=scale)
    results = [(out, *torch.autograd.grad(out.square().sum(), leaves)) for out in outs]
    for expected, actual in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_dtypes_give_the_result_of_sdpa(backend: str, dtype: torch.dtype) -> None:
    if backend not in ("reference", *fast_backends((dtype,))):
        with pytest.raises(ValueError, match=f"{backend}.*supported backends"):
            attend(*qkv(dtype), MASK, backend=backend)
        return
    leaves = [x.requires_grad_() for x in qkv(dtype)]
    out, expected = attend(*leaves, MASK, backend=backend), sdpa(*leaves)
    tolerance = {torch.float64: 1e-10, torch.float32: 2e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}[dtype]
    gradients = [torch.autograd.grad(x.square().sum(), leaves) for x in (out, expected)]
    for one, other in zip((out, *gradients[0]), (expected, *gradients[1]), strict=True):
        assert one.dtype == dtype
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtypes", [(torch.float32,) * 3, (torch.float32, torch.bfloat16, torch.float16)])
def test_autocast_converts_queries_keys_and_values_as_sdpa_does(backend: str, dtypes: tuple) -> None:
    leaves = [x.to(dtype).requires_grad_() for x, dtype in zip(qkv(), dtypes, strict=True)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, expected = attend(*leaves, MASK, backend=backend), sdpa(*leaves)
        lowered = lower(MASK, device="cpu", dtype=torch.bfloat16, training=True, backend=backend)
        assert torch.equal(attend(*leaves, lowered), out)
    assert out.dtype == expected.dtype == torch.bfloat16
    torch.testing.assert_close(out, expected, rtol=3e-2, atol=3e-2)
    for leaf, gradient in zip(leaves, torch.autograd.grad(out.float().sum(), leaves), strict=True):
        assert gradient.dtype == leaf.dtype
    with torch.autocast("cpu", enabled=False):
        assert attend(*qkv(), MASK, backend=backend).dtype == torch.float32


def test_autocast_leaves_float64() -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert attend(*qkv(torch.float64), MASK).dtype == sdpa(*qkv(torch.float64)).dtype == torch.float64


@pytest.mark.parametrize("backend", BACKENDS)
def test_inference_mode(backend: str) -> None:
    with torch.inference_mode():
        mask = sliding_window(1, LENGTH, 9) & document((torch.arange(LENGTH) // 15)[None])
        lowered = lower(mask, device="cpu", dtype=torch.float32, training=False, backend=backend)
        out = attend(*qkv(), lowered)
    torch.testing.assert_close(out.clone(), sdpa(*qkv()), rtol=2e-5, atol=2e-5)
    leaves = [x.requires_grad_() for x in qkv()]
    attend(*leaves, mask, backend=backend).sum().backward()  # a mask that was made in inference mode trains
    assert all(x.grad is not None for x in leaves)


def first_derivative(backend: str, leaves: list[Tensor], loss: Callable[[Tensor], Tensor]) -> tuple[Tensor, ...]:
    return torch.autograd.grad(loss(attend(*leaves, MASK, backend=backend)), leaves, create_graph=True)


LOSSES: list[Callable[[Tensor], Tensor]] = [torch.sum, lambda out: out.square().sum()]


@pytest.mark.parametrize("backend", fast_backends())
@pytest.mark.parametrize("loss", LOSSES, ids=["linear", "square"])
@pytest.mark.parametrize("number", range(3))
def test_a_second_derivative_raises(backend: str, loss: Callable, number: int) -> None:
    """By any input of any first derivative, also where another path to that input exists."""
    leaves = [x.requires_grad_() for x in qkv()]
    for gradient in first_derivative(backend, leaves, loss):
        with pytest.raises((ValueError, RuntimeError), match=f"{backend}.*no second derivative.*reference"):
            torch.autograd.grad(gradient.square().sum() + leaves[number].sum(), leaves[number], retain_graph=True)
    with pytest.raises((ValueError, RuntimeError), match="no second derivative"):
        gradient.square().sum().backward()


def test_the_reference_has_a_second_derivative() -> None:
    leaves = inputs(causal(1, 5), 2, 1, size=2)
    assert torch.autograd.gradgradcheck(lambda *x: attend(*x, causal(1, 5), backend="reference"), leaves)


@pytest.mark.parametrize("backend", BACKENDS)
def test_create_graph_does_not_change_the_first_derivative(backend: str) -> None:
    leaves = [x.requires_grad_() for x in qkv()]
    expected = torch.autograd.grad(attend(*leaves, MASK, backend=backend).sum(), leaves)
    for one, other in zip(first_derivative(backend, leaves, torch.sum), expected, strict=True):
        assert torch.equal(one, other)


def batched_gradients(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    x = x.requires_grad_()
    cotangents = torch.randn(3, *x.shape, generator=torch.Generator().manual_seed(1))
    return torch.autograd.grad(function(x), x, cotangents, is_grads_batched=True)[0]


def tangent(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    return torch.func.jvp(function, (x,), (torch.ones_like(x),))[1]


def forward_mode(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    with torch.autograd.forward_ad.dual_level():
        out = function(torch.autograd.forward_ad.make_dual(x, torch.ones_like(x)))
        return torch.autograd.forward_ad.unpack_dual(out).tangent


TRANSFORMS: dict[str, Callable[[Callable[[Tensor], Tensor], Tensor], Tensor]] = {
    "vmap": lambda function, x: torch.vmap(function)(torch.stack([x, x + 1])),
    "grad": lambda function, x: torch.func.grad(lambda y: function(y).square().sum())(x),
    "jvp": tangent,
    "forward mode": forward_mode,
    "batched gradients": batched_gradients,
}


@pytest.mark.parametrize("name", TRANSFORMS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_transforms_are_right_or_rejected(name: str, backend: str) -> None:
    q, k, v = qkv()

    def manual(q: Tensor) -> Tensor:
        scores = (q @ k.mT * SIZE**-0.5).masked_fill(~MASK.to_dense()[:, None], -torch.inf)
        return scores.softmax(-1) @ v

    def function(q: Tensor) -> Tensor:
        return attend(q, k, v, MASK, backend=backend)

    try:
        result = TRANSFORMS[name](function, q)
    except (ValueError, RuntimeError) as error:
        assert backend != "reference" and backend in str(error) and "reference" in str(error)
    else:
        torch.testing.assert_close(result, TRANSFORMS[name](manual, q), rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(0, 4, 5), (2, 0, 5), (2, 4, 0)])
def test_sizes_of_zero(backend: str, shape: tuple[int, int, int]) -> None:
    rows, queries, keys = shape
    mask = AttentionMask(*(torch.zeros(rows, queries, 1, dtype=torch.int32) for _ in range(2)), keys)
    leaves = inputs(mask, 4, 2, value_dim=6, dtype=torch.float32)
    sinks = torch.zeros(4, requires_grad=True)
    out = attend(*leaves, mask, backend=backend, sinks=sinks)
    assert torch.equal(out, torch.zeros(rows, 4, queries, 6))
    for leaf, gradient in zip((*leaves, sinks), torch.autograd.grad(out.sum(), (*leaves, sinks)), strict=True):
        assert torch.equal(gradient, torch.zeros_like(leaf))


def mask_of(start: list[int], stop: list[int]) -> AttentionMask:
    """One row of 8 queries with the same intervals and T = 8."""
    return AttentionMask(*(torch.tensor(x, dtype=torch.int32).expand(1, 8, -1).clone() for x in (start, stop)), 8)


def changed(**change: Any) -> dict[str, Any]:
    """Valid arguments of `attend` with some replaced; a tuple is the shape of a tensor."""
    arguments = {"q": (1, 4, 8, 4), "k": (1, 2, 8, 4), "v": (1, 2, 8, 4), "mask": causal(1, 8)} | change
    return {name: torch.randn(x, requires_grad=True) if isinstance(x, tuple) else x for name, x in arguments.items()}


DENSE = torch.ones(1, 8, 8, dtype=torch.bool)
KEYS = torch.randn(1, 2, 8, 4)


@pytest.mark.parametrize("backend", ["auto", *BACKENDS])
@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"k": (1, 2, 9, 4)}, "expected q"),
        ({"v": (1, 1, 8, 4)}, "expected q"),
        ({"q": (4, 8, 4)}, r"expected q \[B, H, Q, D\].*got q \(4, 8, 4\)"),
        ({"k": (), "v": ()}, r"expected q \[B, H, Q, D\].*k \(\)"),
        ({"q": (1, 3, 8, 4)}, "multiple of key/value heads, got 3 and 2"),
        ({"k": (1, 0, 8, 4), "v": (1, 0, 8, 4)}, r"must be at least 1, got .*k \(1, 0, 8, 4\)"),
        ({"q": (1, 4, 8, 0), "k": (1, 2, 8, 0)}, r"must be at least 1, got .*k \(1, 2, 8, 0\)"),
        ({"q": (2, 4, 8, 4)}, "have the same B and D"),
        ({"q": (1, 4, 7, 4)}, r"the mask is for \(B, Q, T\) = \(1, 8, 8\)"),
        ({"sinks": (3,)}, r"sinks must be \[H\] = \[4\]"),
        ({"sinks": [0.0] * 4}, "sinks must be a tensor, got list"),
        ({"q": None}, "q must be a tensor, got NoneType"),
        ({"k": KEYS.long()}, "k must be float64, float32, bfloat16 or float16, got torch.int64"),
        ({"v": KEYS.bfloat16()}, "one dtype, got q torch.float32, k torch.float32, v torch.bfloat16"),
        ({"k": KEYS.to("meta")}, "k must be on the device of q, cpu, got meta"),
        ({"sinks": torch.zeros(4, device="meta")}, "sinks must be on the device of q, cpu, got meta"),
        ({"k": KEYS.to_sparse()}, "k must be a dense tensor, got layout torch.sparse_coo"),
        ({"mask": None}, "mask must be an AttentionMask, got NoneType; for full attention use"),
        ({"mask": DENSE}, "got Tensor; convert a bool .* with AttentionMask.from_dense"),
        ({"mask": {"a": causal(1, 8)}}, "got dict; pass one of the masks: 'a'"),
        (
            {"mask": causal(1, 8).to_block_mask()},
            "got BlockMask; convert its mask_mod with AttentionMask.from_mask_mod",
        ),
        ({"mask": mask_of([-3], [4])}, "interval"),
        ({"mask": mask_of([0], [9])}, "interval"),
        ({"mask": mask_of([0, 2], [3, 5])}, "interval"),
        ({"mask": mask_of([5, 1], [6, 2])}, "interval"),
        ({"scale": float("nan")}, "scale must be a finite number or None, got nan"),
        ({"scale": torch.tensor(0.5)}, r"scale must be a finite number or None, got tensor\(0.5000\)"),
        ({"softcap": 0.0}, "softcap must be greater than 0, got 0.0; use None"),
        ({"softcap": float("inf")}, "softcap must be a finite number or None, got inf"),
    ],
)
def test_invalid_arguments(change: dict[str, Any], text: str, backend: str) -> None:
    with pytest.raises(ValueError, match=text):
        attend(**changed(**change), backend=backend)


@pytest.mark.parametrize(
    ("backend", "text"),
    [
        ("magic", "unknown attention backend 'magic'; expected one of: auto, flex, sdpa, varlen"),
        ("flex", r"flex does not train on a CPU.*supported backends: .*tiled, .*reference"),
        ("varlen", r"varlen runs on CUDA only.*supported backends: .*tiled, .*reference"),
    ],
)
def test_unsupported_backends(backend: str, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        attend(**changed(), backend=backend)


def test_a_mask_lowered_for_another_dtype_is_rejected() -> None:
    lowered = lower(MASK, device="cpu", dtype=torch.float32, training=False)
    with pytest.raises(ValueError, match=r"lowered for torch\.float32 on cpu, but q is torch\.bfloat16 on cpu"):
        attend(*qkv(torch.bfloat16), lowered)


def test_a_mask_lowered_for_inference_is_rejected_in_training() -> None:
    lowered = lower(MASK, device="cpu", dtype=torch.float32, training=False, backend="flex")
    with pytest.raises(ValueError, match="lowered with training=False, but the inputs require gradients"):
        attend(*(x.requires_grad_() for x in qkv()), lowered)


def test_lower_rejects_what_is_not_a_mask() -> None:
    with pytest.raises(ValueError, match="mask must be an AttentionMask, got dict; pass one of the masks: 'a'"):
        lower({"a": MASK}, device="cpu", dtype=torch.float32, training=False)
