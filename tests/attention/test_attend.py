"""Outputs and gradients of each backend against `reference`, and `reference` against a softmax per query."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sightline.attention import BACKENDS, CHOICES, KernelRequirements, attend, check_backend, lower
from sightline.attention.attend import AUTO
from sightline.attention.sdpa import Sdpa
from sightline.attention.tiled import Tiled
from sightline.batch import Batch
from sightline.masks import (
    AttentionMask,
    causal,
    document,
    global_tokens,
    prefix_lm,
    shared_prefix,
    sliding_window,
)
from sightline.models import build_model, config_of
from tests.support.attention import assert_equals_reference, fast_backends, inputs, results
from tests.support.random_masks import expressions


@pytest.mark.parametrize("backend", fast_backends())
@settings(max_examples=80, deadline=None)
@given(expressions(max_length=50), st.sampled_from([(1, 1), (2, 1), (4, 2), (3, 3)]), st.booleans())
def test_equals_reference_under_any_mask(backend, pair, heads, with_sinks) -> None:
    mask, _ = pair
    sinks = torch.linspace(-2, 2, heads[0], dtype=torch.float64).requires_grad_() if with_sinks else None
    assert_equals_reference(backend, mask, *heads, sinks=sinks)


@pytest.mark.parametrize("backend", fast_backends())
@settings(max_examples=30, deadline=None)
@given(st.integers(1, 2), st.integers(1, 9), st.integers(1, 20), st.integers(0, 2**31))
def test_equals_reference_for_different_query_and_key_lengths(backend, rows, queries, keys, seed) -> None:
    dense = torch.rand(rows, queries, keys, generator=torch.Generator().manual_seed(seed)) < 0.4
    assert_equals_reference(backend, AttentionMask.from_dense(dense), 2, 1)


def long_masks() -> dict[str, AttentionMask]:
    length = 1100
    ids = torch.repeat_interleave(torch.arange(6), torch.tensor([1, 300, 1, 500, 20, 278]))[None]
    ids[:, -30:] = -1
    positions = torch.cat([torch.arange(n) for n in (1, 300, 1, 500, 20, 278)])[None]
    causal_mask = causal(1, length)
    starts = torch.zeros(1, length, dtype=torch.bool)
    starts[:, [0, 1, 500, 700]] = True
    is_gap = (torch.arange(length) % 3 == 1)[None, :, None]  # every third query is fully masked
    random = torch.rand(1, 150, length, generator=torch.Generator().manual_seed(0))
    every_other = torch.arange(length).expand(1, 60, -1) % 2 == 0
    five = torch.zeros(1, 60, length, dtype=torch.bool)
    for k in range(5):
        five[:, :, 200 * k : 200 * k + 3] = True
    return {
        "documents": causal_mask & document(ids),
        "both directions": document(ids),
        "window": sliding_window(1, length, 70) & document(ids),
        "wide window": sliding_window(1, length, 900),
        "prefix": (prefix_lm(positions, torch.full_like(positions, 100)) | causal_mask) & document(ids),
        "shared": shared_prefix(ids, torch.where(ids < 0, -1, 1)) & causal_mask,
        "K = 4": (global_tokens(starts) | sliding_window(1, length, 40)) & causal_mask,
        "K = 5": AttentionMask.from_dense(five),
        "K = 550": AttentionMask.from_dense(every_other, max_intervals=length),
        "random": AttentionMask.from_dense(random < 0.3, max_intervals=length),
        "gaps": AttentionMask(
            causal_mask.start.masked_fill(is_gap, 0), causal_mask.stop.masked_fill(is_gap, 0), length
        ),
        "shard": causal_mask.take_queries(torch.arange(1, length, 3)),
    }


@pytest.mark.parametrize("backend", fast_backends())
@pytest.mark.parametrize("name", long_masks())
def test_equals_reference_on_long_masks(name: str, backend: str) -> None:
    sinks = torch.tensor([0.5, -1.0, 2.0, 0.0], dtype=torch.float64).requires_grad_()
    assert_equals_reference(backend, long_masks()[name])
    assert_equals_reference(backend, long_masks()[name], sinks=sinks)


def test_float32_and_bfloat16_are_close_to_the_reference() -> None:
    for dtype, tolerance in ((torch.float32, 2e-5), (torch.bfloat16, 5e-2)):
        for mask in long_masks().values():
            leaves = inputs(mask, 4, 2, dtype=dtype)
            for one, other in zip(
                results("tiled", mask, leaves, None), results("reference", mask, leaves, None), strict=True
            ):
                torch.testing.assert_close(one.float(), other.float(), rtol=tolerance, atol=tolerance)


def test_reference_is_a_softmax_over_the_visible_keys() -> None:
    mask = (sliding_window(2, 9, 4) & document(torch.tensor([[0] * 4 + [1] * 5, [0] * 3 + [1] * 3 + [-1] * 3]))) | (
        AttentionMask.from_dense(torch.eye(9, dtype=torch.bool).roll(5, 1).expand(2, 9, 9))
        & document(torch.zeros(2, 9, dtype=torch.int32))
    )
    q, k, v = (x.detach() for x in inputs(mask, 4, 2))
    sinks = torch.tensor([0.3, 0.0, -1.0, 4.0], dtype=torch.float64)
    dense = mask.to_dense()
    out = attend(q, k, v, mask, backend="reference", sinks=sinks)
    for b in range(2):
        for h in range(4):
            for i in range(9):
                keys = dense[b, i].nonzero().flatten()
                logits = [float(q[b, h, i] @ k[b, h // 2, j]) / 8**0.5 for j in keys]
                weights = torch.tensor([*logits, float(sinks[h])], dtype=torch.float64).softmax(0)[:-1]
                expected = sum((w * v[b, h // 2, j] for w, j in zip(weights, keys, strict=True)), torch.zeros(8))
                torch.testing.assert_close(out[b, h, i], expected.double())


@pytest.mark.parametrize("with_sinks", [False, True])
def test_gradients_by_finite_differences(with_sinks: bool) -> None:
    ids = torch.tensor([[0, 0, 0, 1, 2, 2, 2, -1]])
    starts = torch.tensor([[True, False, False, False, False, False, False, False]])
    mask = (global_tokens(starts) | sliding_window(1, 8, 2)) & causal(1, 8) & document(ids.clamp(min=-1))
    leaves = inputs(mask, 2, 1, size=4)
    sinks = torch.tensor([0.5, -0.5], dtype=torch.float64, requires_grad=True) if with_sinks else None
    leaves_and_sinks = leaves if sinks is None else (*leaves, sinks)
    for backend in ("reference", *fast_backends((torch.float64,))):
        assert torch.autograd.gradcheck(
            lambda *x, b=backend: attend(*x[:3], mask, backend=b, sinks=x[3] if with_sinks else None), leaves_and_sinks
        )


@pytest.mark.parametrize("backend", ["reference", *fast_backends()])
def test_padding_gives_exact_zeros_and_zero_gradients(backend: str) -> None:
    ids = torch.tensor([[0] * 5 + [-1] * 3, [-1] * 8])
    mask = causal(2, 8) & document(ids)
    leaves = inputs(mask, 4, 2, dtype=torch.float32)
    sinks = torch.zeros(4, requires_grad=True)
    out, d_q, d_k, d_v, d_sinks = results(backend, mask, leaves, sinks)
    padding = ids < 0
    for x in (out, d_q, d_k, d_v):
        assert torch.equal(x.transpose(1, 2)[padding], torch.zeros_like(x.transpose(1, 2)[padding]))
        assert x.isfinite().all()
    assert d_sinks.isfinite().all() and d_sinks.abs().sum() > 0


@pytest.mark.parametrize("backend", ["reference", *fast_backends()])
def test_fully_masked_queries_between_others_give_exact_zeros(backend: str) -> None:
    mask, masked = causal(1, 300), torch.arange(300) % 3 == 1
    mask = AttentionMask(*(x.masked_fill(masked[None, :, None], 0) for x in (mask.start, mask.stop)), 300)
    sinks = torch.zeros(4, requires_grad=True)
    out, d_q, d_k, d_v, _ = results(backend, mask, inputs(mask, 4, 2, dtype=torch.float32), sinks)
    for x in (out, d_q):
        assert not x[:, :, masked].any() and x[:, :, ~masked].any(dim=3).all()
    assert d_k.isfinite().all() and d_v[:, :, :-1].any(dim=3).all()


@pytest.mark.parametrize("backend", ["reference", *fast_backends()])
def test_no_leakage_between_documents(backend: str) -> None:
    """Perturb one token: outputs and gradients of the other documents stay bitwise equal."""
    ids = torch.repeat_interleave(torch.arange(9), torch.tensor([3, 1, 200, 5, 1, 40, 2, 17, 31]))[None]
    length = ids.shape[1]
    for mask in (
        causal(1, length) & document(ids),
        sliding_window(1, length, 12) & document(ids),
        document(ids),
    ):
        leaves = inputs(mask, 4, 2, dtype=torch.float32)
        before = results(backend, mask, leaves, None)
        for token in (0, 3, 100, 206, 230, length - 1):
            changed = [x.detach().clone() for x in leaves]
            for x in changed:
                x[:, :, token] += 3.0
            after = results(backend, mask, tuple(x.requires_grad_() for x in changed), None)
            others = (ids != ids[0, token])[0]
            for one, other in zip(before, after, strict=True):
                assert torch.equal(one[:, :, others], other[:, :, others])
            assert not torch.equal(before[0][:, :, ~others], after[0][:, :, ~others])


def test_a_lowered_mask_equals_the_mask() -> None:
    mask = causal(2, 16)
    leaves = inputs(mask, 2, 2)
    lowered = lower(mask, device="cpu", dtype=torch.float64, training=True)
    assert lowered.backend.name == "tiled" and "CPU" in lowered.reason
    assert torch.equal(attend(*leaves, lowered), attend(*leaves, mask))


def test_scale() -> None:
    mask = causal(1, 12)
    leaves = inputs(mask, 2, 2)
    one, other = (attend(*leaves, mask, backend=b, scale=0.7) for b in ("tiled", "reference"))
    torch.testing.assert_close(one, other)
    assert not torch.allclose(one, attend(*leaves, mask))


def test_sdpa_with_a_dense_mask_equals_tiled() -> None:
    """The code path of other devices, run here with the unfused CPU kernel."""
    masks = {**long_masks(), "plain causal": causal(2, 20), "one token": causal(1, 1)}
    sink_logits = torch.tensor([0.5, -1.0, 2.0, 0.0], dtype=torch.float64).requires_grad_()
    requirements = KernelRequirements(device=torch.device("cpu"), dtype=torch.float64, training=True)
    for mask in masks.values():
        dense = replace(
            lower(mask, device="cpu", dtype=torch.float64, training=True),
            backend=Sdpa(),
            inputs=Sdpa().lower(mask, requirements),
        )
        for sinks in (None, sink_logits):
            leaves = inputs(mask, 4, 2)
            for one, other in zip(
                results("auto", dense, leaves, sinks), results("tiled", mask, leaves, sinks), strict=True
            ):
                torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


def test_sdpa_selects_as_auto_on_a_cpu() -> None:
    for dtype in (torch.float32, torch.float64):
        one, other = (
            lower(causal(1, 4), device="cpu", dtype=dtype, training=True, backend=b) for b in ("sdpa", "auto")
        )
        assert one.backend is other.backend and one.backend.name != "sdpa"


def test_choices_are_auto_and_all_backends() -> None:
    assert ("auto", *(backend.name for backend in BACKENDS)) == CHOICES
    assert set(CHOICES) == {"auto", "flex", "sdpa", "varlen", "native", "tiled", "reference"}


@pytest.mark.parametrize(
    ("backend", "requirements", "text"),
    [
        (
            "flex",
            {"training": True},
            "flex does not train on a CPU.*supported backends: sdpa.*tiled, reference",
        ),
        ("flex", {"sinks": True}, "flex does not support sinks on a CPU"),
        ("varlen", {}, "varlen runs on CUDA only, got device cpu"),
        (
            "tiled",
            {"device": torch.device("cuda")},
            "tiled runs on a CPU only, got device cuda.*supported backends: flex",
        ),
        ("varlen", {"device": torch.device("cuda")}, "bfloat16 or float16, got torch.float32"),
        (
            "varlen",
            {"device": torch.device("cuda"), "dtype": torch.bfloat16, "head_dim": 512},
            "head_dim of at most 256, got 512",
        ),
        ("magic", {}, "unknown attention backend 'magic'"),
    ],
)
def test_unsupported_requirements_are_rejected_before_a_mask_is_known(
    backend: str, requirements: dict, text: str
) -> None:
    with pytest.raises(ValueError, match=text):
        check_backend(
            backend, KernelRequirements(**{"device": torch.device("cpu"), "dtype": torch.float32, **requirements})
        )
    check_backend(
        "auto", KernelRequirements(device=torch.device("cuda"), dtype=torch.float32, sinks=True, head_dim=512)
    )


def test_backends_are_checked_with_all_requirements_of_the_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sinks and head_dim are passed when a model is built and when a mask is lowered."""
    received: list[KernelRequirements] = []
    monkeypatch.setitem(AUTO, "cpu", ("tiled",))
    monkeypatch.setattr(Tiled, "supports", lambda self, requirements: received.append(requirements))
    model = build_model(replace(config_of("gpt_oss-debug"), head_dim=24))
    model.check_backend(torch.device("cpu"), torch.float32, training=True)
    batch = Batch.from_documents([[1, 2, 3], [4, 5]], length=8)
    model(batch.tokens, attention_masks=model.get_attention_masks(batch), positions=batch.positions)
    assert received and {(requirements.sinks, requirements.head_dim) for requirements in received} == {(True, 24)}
    received.clear()
    attend(*(torch.randn(1, 2, 8, 4) for _ in range(3)), causal(1, 8))
    assert [requirements.head_dim for requirements in received] == [4]
