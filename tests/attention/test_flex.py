"""The flex backend: forward on a CPU, compiled once for all layouts; training on CUDA in the tests marked gpu."""

import shutil

import pytest
import torch
from torch._dynamo.utils import counters

from sightline.attention import attend, lower
from sightline.masks import AttentionMask, causal, document, global_tokens, sliding_window
from tests.support.attention import inputs, results

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile on a CPU needs g++")
CUDA = torch.cuda.is_available()


def random_documents(seed: int, length: int) -> torch.Tensor:
    """Random document ids int32 [2, length] with padding in the second row."""
    generator = torch.Generator().manual_seed(seed)
    cuts = torch.rand(2, length, generator=generator) < 0.02
    ids = cuts.cumsum(dim=1).to(torch.int32)
    ids[1, length - int(torch.randint(1, length // 2, (), generator=generator)) :] = -1
    return ids


def masks(seed: int, length: int) -> list[AttentionMask]:
    ids = random_documents(seed, length)
    return [
        causal(2, length) & document(ids),
        sliding_window(2, length, 20 + seed % 30) & document(ids),
        document(ids),
    ]


@needs_compiler
def test_forward_equals_reference_and_new_layouts_do_not_recompile() -> None:
    """A thousand layouts of three rules use one compiled kernel. (A new length or K adds one.)"""
    length = 200
    q, k, v = (x.detach().float() for x in inputs(masks(0, length)[0], 4, 2, size=16))
    with torch.no_grad():
        attend(q, k, v, masks(0, length)[0], backend="flex")
        before = counters["stats"]["unique_graphs"]
        for seed in range(334):
            for mask in masks(seed, length):
                out = attend(q, k, v, mask, backend="flex")
                if seed % 50 == 0:
                    expected = attend(q, k, v, mask, backend="reference")
                    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
        assert counters["stats"]["unique_graphs"] == before


@needs_compiler
def test_several_intervals_and_unsupported_sinks() -> None:
    length = 200
    starts = torch.zeros(2, length, dtype=torch.bool)
    starts[:, [0, 60, 120]] = True
    mask = (global_tokens(starts) | sliding_window(2, length, 16)) & causal(2, length)
    q, k, v = (x.detach().float() for x in inputs(mask, 4, 2, size=16))
    with torch.no_grad():
        out = attend(q, k, v, mask, backend="flex")
    torch.testing.assert_close(out, attend(q, k, v, mask, backend="reference"), rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="does not support sinks"), torch.no_grad():
        attend(q, k, v, mask, backend="flex", sinks=torch.zeros(4))


def test_training_on_a_cpu_is_rejected_before_the_kernel_is_called() -> None:
    """One such call would leave all later flex calls of the process uncompiled."""
    with pytest.raises(ValueError, match=r"flex does not train on a CPU.* sdpa.*tiled, reference"):
        lower(causal(1, 8), backend="flex", device="cpu", dtype=torch.float32, training=True)


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="needs CUDA")
@pytest.mark.parametrize("backend", ["flex", "varlen", "sdpa"])
@pytest.mark.parametrize("with_sinks", [False, True])
def test_cuda_gradients_are_close_to_the_reference(backend: str, with_sinks: bool) -> None:
    length = 700
    for mask in masks(1, length):
        leaves = inputs(mask, 4, 2, size=64)
        sinks = torch.tensor([0.5, -1.0, 2.0, 0.0], dtype=torch.float64).requires_grad_() if with_sinks else None
        expected = results("reference", mask, leaves, sinks)
        low_precision = [x.detach().to("cuda", torch.bfloat16).requires_grad_() for x in leaves]
        low_precision_sinks = sinks.detach().to("cuda", torch.float32).requires_grad_() if sinks is not None else None
        out = attend(*low_precision, mask.to("cuda"), backend=backend, sinks=low_precision_sinks)
        cotangent = torch.randn(out.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
        wanted = low_precision if low_precision_sinks is None else [*low_precision, low_precision_sinks]
        actual = [out, *torch.autograd.grad(out, wanted, cotangent.to("cuda", torch.bfloat16))]
        for one, other in zip(actual, expected, strict=True):
            error = (one.double().cpu() - other).norm() / other.norm()
            assert error < 2e-2, f"relative error {error:.3g}"


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="needs CUDA")
@pytest.mark.parametrize(("backend", "softcap"), [("flex", None), ("flex", 2.0), ("varlen", None), ("sdpa", None)])
def test_cuda_gradients_with_values_of_another_width_and_softcap(backend: str, softcap: float | None) -> None:
    for mask in masks(1, 700):
        leaves = inputs(mask, 4, 2, size=96, value_dim=64)
        expected = results("reference", mask, leaves, None, softcap=softcap)
        low_precision = [x.detach().to("cuda", torch.bfloat16).requires_grad_() for x in leaves]
        out = attend(*low_precision, mask.to("cuda"), backend=backend, softcap=softcap)
        cotangent = torch.randn(out.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
        actual = [out, *torch.autograd.grad(out, low_precision, cotangent.to("cuda", torch.bfloat16))]
        for one, other in zip(actual, expected, strict=True):
            error = (one.double().cpu() - other).norm() / other.norm()
            assert error < 2e-2, f"relative error {error:.3g}"
