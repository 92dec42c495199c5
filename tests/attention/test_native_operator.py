"""The operators of the native backend under autograd, torch.compile, fake tensors and selective recompute."""

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.library import opcheck
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from sightline.attention import Lowered, attend, lower
from sightline.attention.native import ATTENTION, ATTENTION_BACKWARD, Native
from sightline.masks import causal, document
from sightline.native import kernel
from sightline.parallel.recompute import SAVED_OPS
from tests.support.native import FLOAT32, native, needs_native, random_inputs
from tests.support.random_masks import packed

pytestmark = needs_native


def lowered(*lengths: int, dtype: torch.dtype = torch.float32) -> Lowered:
    return lower(packed(*lengths), device="cpu", dtype=dtype, training=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_operators_pass_the_checks_of_torch(dtype: torch.dtype) -> None:
    mask = packed(5, 7, padding=2)
    packed_mask = Native().lower(mask, FLOAT32).packed
    leaves = random_inputs(mask, (4, 2), (8, 6), dtype=dtype)
    for sinks in (None, torch.randn(4, requires_grad=True)):
        opcheck(ATTENTION, (*leaves, sinks, packed_mask, 0.3, 2.0))
        inputs = [x.detach() for x in leaves]
        sinks = sinks if sinks is None else sinks.detach()
        out, lse = ATTENTION(*inputs, sinks, packed_mask, 0.3, 2.0)
        opcheck(ATTENTION_BACKWARD, (torch.randn_like(out), *inputs, sinks, packed_mask, out, lse, 0.3, 2.0))


def test_second_derivatives_are_refused() -> None:
    mask = packed(5, 7)
    leaves = random_inputs(mask)
    (d_q,) = torch.autograd.grad(native(*leaves, mask).sum(), leaves[0], create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivatives; use the backend `reference`"):
        torch.autograd.grad(d_q.sum(), leaves[1])


def test_forward_mode_derivatives_are_refused() -> None:
    mask = lowered(5, 7)
    q, k, v = (x.detach() for x in random_inputs(mask.mask))
    with pytest.raises(RuntimeError, match="no forward-mode derivatives; use the backend `reference`"):
        torch.func.jvp(lambda x: attend(q, x, v, mask), (k,), (k,))
    with forward_ad.dual_level(), pytest.raises(RuntimeError, match="no forward-mode derivatives"):
        attend(forward_ad.make_dual(q, q), k, v, mask)
    mapped = torch.vmap(lambda x: attend(q, x, v, mask))(torch.stack([k, 2 * k]))
    torch.testing.assert_close(mapped, torch.stack([attend(q, x, v, mask) for x in (k, 2 * k)]))


def test_only_the_needed_gradients_reach_the_leaves() -> None:
    mask = packed(5, 7)
    q, k, v = random_inputs(mask)
    native(q.detach(), k, v.detach(), mask).sum().backward()
    assert q.grad is None and v.grad is None and k.grad is not None
    with torch.inference_mode():
        assert not native(q, k, v, mask).requires_grad


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_layouts_share_one_graph_without_breaks(backend: str) -> None:
    """Other documents change the size of the packed mask, which is not compiled in."""
    counter = CompileCounterWithBackend(backend)

    def layer(q: Tensor, k: Tensor, v: Tensor, mask: Lowered) -> Tensor:
        return 3 * attend(2 * q, k, v, mask)

    compiled = torch.compile(layer, backend=counter, fullgraph=True)
    sizes = set()
    for lengths in ((200,), (100, 100), (1, 150, 49), (50, 50, 50, 50), tuple([2] * 100)):
        mask = lowered(*lengths)
        sizes.add(len(mask.inputs.packed))
        leaves = random_inputs(mask.mask)
        found, expected = (f(*leaves, mask) for f in (compiled, layer))
        torch.testing.assert_close(found, expected)
        gradients = [torch.autograd.grad(out.square().sum(), leaves) for out in (found, expected)]
        torch.testing.assert_close(*gradients)
    assert len(sizes) > 1 and counter.frame_count == 1


def test_fake_tensors_have_the_shapes_and_strides_of_real_ones() -> None:
    mask = packed(5, 7)
    packed_mask = Native().lower(mask, FLOAT32).packed
    for dtype in (torch.float32, torch.bfloat16):
        real = random_inputs(mask, (4, 2), (8, 6), dtype=dtype)
        sinks = torch.randn(4, requires_grad=True)
        out, lse = ATTENTION(*real, sinks, packed_mask, 0.3, 0.0)
        gradients = torch.autograd.grad(out.sum(), [*real, sinks])
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            fake = [mode.from_tensor(x).detach().requires_grad_() for x in (*real, sinks)]
            fake_out, fake_lse = ATTENTION(*fake, torch.zeros(0, dtype=torch.int32), 0.3, 0.0)
            fake_gradients = torch.autograd.grad(fake_out.sum(), fake)
        for one, other in zip((out, lse, *gradients), (fake_out, fake_lse, *fake_gradients), strict=True):
            assert (one.shape, one.stride(), one.dtype) == (other.shape, other.stride(), other.dtype)


def test_selective_recompute_saves_the_results(monkeypatch: pytest.MonkeyPatch) -> None:
    calls, get_library, mask = [], kernel.get_library, lowered(5, 7)
    monkeypatch.setattr(kernel, "get_library", lambda: calls.append(1) or get_library())
    leaves = random_inputs(mask.mask)

    def contexts() -> tuple:
        return create_selective_checkpoint_contexts(SAVED_OPS)

    out = checkpoint(lambda *x: attend(*x, mask).sin(), *leaves, use_reentrant=False, context_fn=contexts)
    assert len(calls) == 1
    found = torch.autograd.grad(out.sum(), leaves)
    assert len(calls) == 2, "one forward and one backward"
    torch.testing.assert_close(found, torch.autograd.grad(attend(*leaves, mask).sin().sum(), leaves))


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"q": (1, 4, 11, 8)}, r"a mask of \(B, Q, T\) = \(1, 12, 12\) does not fit q \(1, 4, 11, 8\)"),
        ({"v": (1, 2, 11, 8)}, "does not fit"),
        ({"k": (1, 2, 12, 9)}, "does not fit"),
        ({"q": (1, 3, 12, 8)}, "not a multiple of key/value heads"),
        ({"dtype": torch.float16}, "expected q, k, v of dtype float32 or bfloat16, got torch.float16"),
        ({"sinks": torch.zeros(3)}, r"expected sinks float32 \[4\], got torch.float32 \(3,\)"),
        ({"sinks": torch.zeros(4).double()}, r"expected sinks float32 \[4\], got torch.float64"),
        ({"mask": torch.zeros(0, dtype=torch.int32)}, r"expected a mask from pack_intervals, got torch.int32 \(0,\)"),
        ({"mask": torch.zeros(50, dtype=torch.int64)}, "expected a mask from pack_intervals, got torch.int64"),
        ({"mask": torch.full((50,), 7, dtype=torch.int32)}, "expected a mask from pack_intervals"),
        ({"mask": torch.full((50,), -7, dtype=torch.int32)}, "expected a mask from pack_intervals"),
    ],
)
def test_invalid_arguments(change: dict, text: str) -> None:
    shapes = {"q": (1, 4, 12, 8), "k": (1, 2, 12, 8), "v": (1, 2, 12, 8)}
    tensors = [
        torch.randn(change.get(name, shape)).to(change.get("dtype", torch.float32)) for name, shape in shapes.items()
    ]
    mask = change.get("mask", Native().lower(packed(5, 7), FLOAT32).packed)
    with pytest.raises(ValueError, match=text):
        ATTENTION(*tensors, change.get("sinks"), mask, 0.3, 0.0)


def test_invalid_arguments_of_the_backward() -> None:
    mask = packed(5, 7)
    packed_mask = Native().lower(mask, FLOAT32).packed
    q, k, v = (x.detach() for x in random_inputs(mask))
    out, lse = ATTENTION(q, k, v, None, packed_mask, 0.3, 0.0)
    for d_out, o, total, text in (
        (out[:, :, 1:], out, lse, r"the gradient of the output is torch.float32 \(1, 4, 11, 8\), expected"),
        (out.double(), out, lse, "the gradient of the output is torch.float64"),
        (out, out[..., 1:], lse, r"the output is torch.float32 \(1, 4, 12, 7\), expected"),
        (out, out, lse[:, 1:], r"the log-sum-exp is torch.float32 \(1, 3, 12\), expected float32 \(1, 4, 12\)"),
    ):
        with pytest.raises(ValueError, match=text):
            ATTENTION_BACKWARD(d_out, q, k, v, None, packed_mask, o, total, 0.3, 0.0)


def test_intervals_that_are_not_canonical_are_refused() -> None:
    mask = causal(1, 12) & document(torch.zeros(1, 12, dtype=torch.int32))
    for name, query, value in (("start", 3, -1), ("stop", 3, 13), ("start", 3, 9)):
        changed = causal(1, 12)
        getattr(changed, name)[0, query, 0] = value
        with pytest.raises(ValueError, match="intervals are not canonical"):
            Native().lower(changed, FLOAT32)
    Native().lower(mask, FLOAT32)
