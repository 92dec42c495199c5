"""Soft-capped scores, and values with another number of channels than keys, in each backend."""

import shutil
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sightline.attention import KernelRequirements, attend, check_backend, lower
from sightline.attention.sdpa import Sdpa
from sightline.attention.tiled import Tiled
from sightline.layers import GroupedQueryAttention
from sightline.masks import AttentionMask, causal, document, sliding_window
from sightline.models import build_model
from tests.attention.test_attend import long_masks
from tests.support.attention import assert_equals_reference, fast_backends, inputs, results
from tests.support.random_masks import expressions

SINKS = torch.tensor([0.5, -1.0, 2.0, 0.0], dtype=torch.float64)


@pytest.mark.parametrize("softcap", [None, 0.8])
@pytest.mark.parametrize("value_dim", [3, 13])
def test_reference_is_a_softmax_of_capped_scores(softcap: float | None, value_dim: int) -> None:
    mask = sliding_window(2, 9, 4) & document(torch.tensor([[0] * 4 + [1] * 5, [0] * 3 + [1] * 3 + [-1] * 3]))
    q, k, v = (x.detach() for x in inputs(mask, 4, 2, value_dim=value_dim))
    out = attend(q, k, v, mask, backend="reference", sinks=SINKS, softcap=softcap, scale=0.9)
    assert out.shape == (2, 4, 9, value_dim)
    for b, h, i in ((b, h, i) for b in range(2) for h in range(4) for i in range(9)):
        keys = mask.to_dense()[b, i].nonzero().flatten()
        scores = 0.9 * k[b, h // 2, keys] @ q[b, h, i]
        if softcap is not None:
            scores = softcap * (scores / softcap).tanh()
        weights = torch.cat([scores, SINKS[h : h + 1]]).softmax(0)[:-1]
        expected = weights @ v[b, h // 2, keys] if len(keys) else torch.zeros(value_dim, dtype=torch.float64)
        torch.testing.assert_close(out[b, h, i], expected)


def test_gradients_by_finite_differences() -> None:
    mask = sliding_window(1, 8, 3) & document(torch.tensor([[0, 0, 0, 1, 2, 2, 2, -1]]))
    cases: list[tuple[str, float | None]] = [("reference", 0.7), *((b, None) for b in fast_backends((torch.float64,)))]
    for backend, softcap in cases:
        for value_dim in (2, 7):
            leaves = inputs(mask, 2, 1, size=4, value_dim=value_dim)
            assert torch.autograd.gradcheck(
                lambda *x, b=backend, s=softcap: attend(*x, mask, backend=b, softcap=s), leaves
            )


@pytest.mark.parametrize("backend", fast_backends())
@settings(max_examples=40, deadline=None)
@given(expressions(max_length=40), st.sampled_from([(1, 1), (4, 2)]), st.sampled_from([1, 5, 20]), st.booleans())
def test_values_of_another_width_equal_reference(backend, pair, heads, value_dim, with_sinks) -> None:
    sinks = torch.linspace(-2, 2, heads[0], dtype=torch.float64).requires_grad_() if with_sinks else None
    assert_equals_reference(backend, pair[0], *heads, sinks=sinks, value_dim=value_dim)


@pytest.mark.parametrize("backend", fast_backends())
def test_values_of_another_width_equal_reference_on_long_masks(backend: str) -> None:
    for mask in long_masks().values():
        assert_equals_reference(backend, mask, value_dim=6)
        assert_equals_reference(backend, mask, value_dim=10)


@pytest.mark.parametrize("backend", fast_backends(softcap=True) or [pytest.param("", marks=pytest.mark.skip)])
@settings(max_examples=40, deadline=None)
@given(expressions(max_length=40), st.sampled_from([0.3, 2.0, 50.0]), st.sampled_from([5, 8]), st.booleans())
def test_softcap_equals_reference(backend, pair, softcap, value_dim, with_sinks) -> None:
    sinks = SINKS.clone().requires_grad_() if with_sinks else None
    assert_equals_reference(backend, pair[0], sinks=sinks, value_dim=value_dim, softcap=softcap)


def test_sdpa_with_a_dense_mask() -> None:
    requirements = KernelRequirements(device=torch.device("cpu"), dtype=torch.float64, training=True)
    for mask in (causal(1, 20), long_masks()["documents"]):
        lowered = lower(mask, device="cpu", dtype=torch.float64, training=True)
        lowered = replace(lowered, backend=Sdpa(), inputs=Sdpa().lower(mask, requirements))
        leaves = inputs(mask, 4, 2, value_dim=5)
        for sinks in (None, SINKS.clone().requires_grad_()):
            for one, other in zip(
                results("auto", lowered, leaves, sinks), results("reference", mask, leaves, sinks), strict=True
            ):
                torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile on a CPU needs g++")
def test_flex_on_a_cpu() -> None:
    mask = causal(2, 150) & document((torch.arange(150) // 40).expand(2, -1))
    q, k, v = (x.detach().float() for x in inputs(mask, 4, 2, size=16, value_dim=32))
    with torch.no_grad():
        for softcap in (0.5, 3.0):
            out, expected = (attend(q, k, v, mask, backend=b, softcap=softcap) for b in ("flex", "reference"))
            torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)


CUDA = {"device": torch.device("cuda"), "dtype": torch.bfloat16}


@pytest.mark.parametrize(
    ("backend", "requirements", "text"),
    [
        ("tiled", {}, r"tiled does not support softcap; supported backends: .*reference"),
        ("sdpa", CUDA, "sdpa does not support softcap; supported backends: flex, reference"),
        ("varlen", CUDA, "varlen does not support softcap; supported backends: flex, reference"),
        ("varlen", {**CUDA, "softcap": False, "value_dim": 512}, "value_dim of at most 256, got 512"),
    ],
)
def test_unsupported_requirements_are_rejected_by_name(backend: str, requirements: dict[str, Any], text: str) -> None:
    default = {"device": torch.device("cpu"), "dtype": torch.float32, "training": True, "softcap": True}
    with pytest.raises(ValueError, match=text):
        check_backend(backend, KernelRequirements(**{**default, **requirements}))


def test_softcap_is_rejected_by_a_backend_without_it() -> None:
    mask = causal(1, 8)
    leaves = inputs(mask, 2, 2)
    with pytest.raises(ValueError, match=r"tiled does not support softcap; supported backends: .*reference"):
        attend(*leaves, mask, backend="tiled", softcap=3.0)
    lowered = lower(mask, device="cpu", dtype=torch.float64, training=True, backend="tiled")
    with pytest.raises(ValueError, match="tiled does not support softcap; pass sinks and softcap to `lower`"):
        attend(*leaves, lowered, softcap=3.0)


def test_models_are_checked_with_the_value_dim_and_softcap_of_their_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    received: list[KernelRequirements] = []
    monkeypatch.setattr(Tiled, "supports", lambda self, requirements: received.append(requirements))
    model = build_model("deepseek_v3-debug")
    model.attention_backend = "tiled"
    model.check_backend(torch.device("cpu"), torch.float32, training=True)
    config = model.config
    expected = (config.qk_nope_head_dim + config.qk_rope_head_dim, config.v_head_dim, False)
    assert [(needs.head_dim, needs.value_dim, needs.softcap) for needs in received] == [expected]
    monkeypatch.undo()

    original = GroupedQueryAttention.kernel_requirements
    monkeypatch.setattr(GroupedQueryAttention, "kernel_requirements", lambda self: {**original(self), "softcap": True})
    model = build_model("llama3-debug")
    model.attention_backend = "tiled"
    with pytest.raises(ValueError, match=r"--attention\.backend.*tiled does not support softcap"):
        model.check_backend(torch.device("cpu"), torch.float32, training=True)


def test_a_mask_lowered_without_sinks_serves_backends_that_support_them() -> None:
    mask: AttentionMask = causal(1, 8)
    leaves, sinks = inputs(mask, 4, 2), SINKS.clone()
    lowered = lower(mask, device="cpu", dtype=torch.float64, training=True)
    assert torch.equal(attend(*leaves, lowered, sinks=sinks), attend(*leaves, mask, sinks=sinks))
