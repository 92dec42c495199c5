from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.testing import assert_close

from sightline.layers import Experts, MoE, Router, SwiGLU, grouped, routers_of
from sightline.layers.grouped import grouped_linear
from sightline.layers.moe import permute, swiglu, unpermute
from sightline.models.gpt_oss import clamped_swiglu

ROUTERS: dict[str, dict[str, Any]] = {
    "qwen3": {"renormalize": True},
    "not renormalized": {},
    "gpt_oss": {"renormalize": True, "bias": True},
    "deepseek_v3": {
        "score": "sigmoid",
        "renormalize": True,
        "scale": 2.5,
        "num_groups": 4,
        "num_limited_groups": 2,
        "expert_bias_update_rate": 0.1,
    },
    "llama4": {"score": "sigmoid"},
}
W, E, K = 12, 8, 3


def make_router(**options: Any) -> Router:
    torch.manual_seed(0)
    router = Router(W, E, K, **options).double()
    router.init_weights(std=0.5)
    for bias in (router.bias, router.expert_bias):
        if bias is not None:
            bias.data.normal_()
    return router


def reference_routing(router: Router, x: Tensor, **options: Any) -> tuple[list[int], list[float]]:
    """Experts and weights of one token, in plain Python."""
    bias = router.bias.tolist() if options.get("bias") else [0.0] * E
    logits = [(row @ x).item() + b for row, b in zip(router.weight.detach(), bias, strict=True)]
    if options.get("score") == "sigmoid":
        scores = [1 / (1 + 2.718281828459045**-logit) for logit in logits]
    else:
        total = sum(2.718281828459045**logit for logit in logits)
        scores = [2.718281828459045**logit / total for logit in logits]
    biased = [
        s + (float(router.expert_bias[e]) if "expert_bias_update_rate" in options else 0.0)
        for e, s in enumerate(scores)
    ]
    allowed = list(range(E))
    if "num_groups" in options:
        groups = [list(range(first, first + 2)) for first in range(0, E, 2)]
        groups.sort(key=lambda group: -sum(biased[e] for e in group))
        allowed = groups[0] + groups[1]
    chosen = sorted(allowed, key=lambda e: -biased[e])[:K]
    weights = [scores[e] for e in chosen]
    if options.get("renormalize"):
        weights = [w / sum(weights) for w in weights]
    return chosen, [w * options.get("scale", 1.0) for w in weights]


@pytest.mark.parametrize("name", ROUTERS)
def test_routing_equals_reference(name: str) -> None:
    router, x = make_router(**ROUTERS[name]), torch.randn(20, W, dtype=torch.float64)
    routing = router(x)
    for token in range(20):
        chosen, weights = reference_routing(router, x[token], **ROUTERS[name])
        got = dict(zip(routing.experts[token].tolist(), routing.weights[token].tolist(), strict=True))
        assert got == pytest.approx(dict(zip(chosen, weights, strict=True)))
    assert routing.counts.tolist() == [int((routing.experts == e).sum()) for e in range(E)]
    assert len(routing.experts.unique()) > K


def test_routing_literals() -> None:
    """Logits 2, 1, 0 of three experts, two selected: e^2 = 7.389, e^1 = 2.718, e^0 = 1."""
    for options, expected in (
        ({}, [7.389 / 11.107, 2.718 / 11.107]),
        ({"renormalize": True}, [7.389 / 10.107, 2.718 / 10.107]),
        ({"score": "sigmoid", "scale": 2.0}, [2 * 0.880797, 2 * 0.731059]),
    ):
        router = Router(1, 3, 2, **options)
        router.weight.data = torch.tensor([[0.0], [2.0], [1.0]])
        weights, experts, counts = router(torch.ones(1, 1))
        order = weights[0].argsort(descending=True)
        assert experts[0][order].tolist() == [1, 2] and counts.tolist() == [0, 1, 1]
        assert weights[0][order].tolist() == pytest.approx(expected, rel=1e-3)


def test_expert_bias_changes_selection_but_not_weights() -> None:
    router = Router(1, 3, 1, score="sigmoid", expert_bias_update_rate=0.1)
    router.weight.data = torch.tensor([[0.0], [2.0], [1.0]])
    router.expert_bias.copy_(torch.tensor([1.0, 0.0, 0.0]))
    weights, experts, _ = router(torch.ones(1, 1))
    assert experts.tolist() == [[0]] and weights.tolist() == [[0.5]]


def test_scores_are_float32_under_autocast() -> None:
    router = make_router(renormalize=True).float()
    x = torch.randn(50, W)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        weights = router(x).weights
    assert torch.equal(weights, router(x).weights)


def make_moe(score_before_experts: bool = False, shared: bool = True, bias: bool = True, **options: Any) -> MoE:
    options = options or ROUTERS["deepseek_v3"]
    experts = Experts(E, W, 10, bias=bias, activation=clamped_swiglu if bias else swiglu)
    moe = MoE(
        make_router(**options), experts, SwiGLU(W, 16) if shared else None, score_before_experts=score_before_experts
    )
    moe.experts.init_weights(0.5, 0.5)
    for parameter in moe.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    return moe.double()


def reference(moe: MoE, x: Tensor, visible: Tensor) -> Tensor:
    """Loop over tokens and their experts."""
    tokens, experts = x.flatten(0, 1), moe.experts
    weights, chosen, _ = moe.router(tokens, visible.flatten())
    outs = []
    for token, is_visible in enumerate(visible.flatten().tolist()):
        out = torch.zeros(W, dtype=x.dtype)
        for weight, e in zip(weights[token], chosen[token].tolist(), strict=True):
            if is_visible:
                x_e = tokens[token] * weight if moe.score_before_experts else tokens[token]
                gate, up = experts.gate[e] @ x_e, experts.up[e] @ x_e
                if experts.gate_bias is not None:
                    gate, up = gate + experts.gate_bias[e], up + experts.up_bias[e]
                y_e = experts.down[e] @ experts.activation(gate, up)
                if experts.down_bias is not None:
                    y_e = y_e + experts.down_bias[e]
                out = out + (y_e if moe.score_before_experts else y_e * weight)
        outs.append(out)
    routed = torch.stack(outs).view_as(x)
    return routed if moe.shared is None else routed + moe.shared(x)


VISIBLE = torch.tensor([[True] * 9, [True] * 4 + [False] * 5])
MOES: dict[str, dict[str, Any]] = {
    "deepseek_v3": {"bias": False},
    "gpt_oss": {"shared": False, "renormalize": True},
    "llama4": {"score_before_experts": True, "bias": False, "score": "sigmoid"},
}


@pytest.mark.parametrize("name", MOES)
@pytest.mark.parametrize(("tokens", "visible"), [(1, True), (1, False), (3, True)])
def test_few_tokens_without_gradients_equal_loop(name: str, tokens: int, visible: bool) -> None:
    """Most experts have no tokens, as in generation; padding gets the shared expert only."""
    torch.manual_seed(0)
    moe, x = make_moe(**MOES[name]), torch.randn(tokens, 1, W, dtype=torch.float64)
    is_visible = torch.full((tokens, 1), visible)
    with torch.no_grad():
        torch.testing.assert_close(moe(x, is_visible), reference(moe, x, is_visible), atol=1e-12, rtol=0)


@pytest.mark.parametrize("name", MOES)
def test_output_and_gradients_equal_reference(name: str) -> None:
    moe, x = make_moe(**MOES[name]), torch.randn(2, 9, W, dtype=torch.float64, requires_grad=True)
    out, expected = moe(x, VISIBLE), reference(moe, x, VISIBLE)
    assert_close(out, expected)
    grad = torch.randn_like(out)
    leaves = [x, *moe.parameters()]
    grads, expected_grads = (torch.autograd.grad(y, leaves, grad, retain_graph=True) for y in (out, expected))
    for actual, wanted in zip(grads, expected_grads, strict=True):
        assert_close(actual, wanted)
        assert wanted.abs().sum() > 0


def test_padding_is_not_routed_or_counted() -> None:
    moe, x = make_moe(), torch.randn(2, 9, W, dtype=torch.float64)
    out = moe(x, VISIBLE)
    assert torch.equal(out[~VISIBLE], moe.shared(x)[~VISIBLE])
    assert moe.router.counts.sum() == 13 * K
    moe.shared = None
    out = moe(torch.where(VISIBLE[..., None], x, torch.inf), VISIBLE)
    assert torch.equal(out[~VISIBLE], torch.zeros(5, W, dtype=torch.float64))
    assert_close(out[VISIBLE], moe(x, VISIBLE)[VISIBLE])
    assert torch.equal(moe(x, torch.zeros_like(VISIBLE)), torch.zeros_like(x)), "rows of only padding"


def test_routing_ignores_other_tokens() -> None:
    """The selected experts of a token are equal for any other tokens, and its output differs only by rounding."""
    moe, x = make_moe(), torch.randn(1, 40, W, dtype=torch.float64)
    full, routing = moe(x), moe.router(x[0])
    others = x.clone()
    others[:, 1:] = torch.randn(1, 39, W, dtype=torch.float64)
    for batch in (others, x[:, :3], x[:, :1], x.repeat(1, 4, 1)):
        again = moe.router(batch[0])
        assert torch.equal(again.experts[0], routing.experts[0])
        assert_close(again.weights[0], routing.weights[0], atol=1e-14, rtol=0)
        assert_close(moe(batch)[:, 0], full[:, 0], atol=1e-13, rtol=0)
    x.requires_grad_(True)
    (grad,) = torch.autograd.grad(moe(x)[:, 0].sum(), x)
    assert torch.equal(grad[:, 1:], torch.zeros_like(grad[:, 1:])) and grad[:, 0].abs().sum() > 0


@pytest.mark.parametrize("counts", [[3, 0, 4, 1], [0, 0, 8, 0], [0, 0, 0, 0], [1, 2, 0, 0]])
@pytest.mark.parametrize("bias", [False, True])
def test_grouped_linear(counts: list[int], bias: bool) -> None:
    x = torch.randn(8, 5, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(4, 3, 5, dtype=torch.float64, requires_grad=True)
    b = torch.randn(4, 3, dtype=torch.float64, requires_grad=True) if bias else None
    out = grouped_linear(x, weight, torch.tensor(counts), b)
    group = [g for g, count in enumerate(counts) for _ in range(count)]
    for row in range(8):
        expected = torch.zeros(3, dtype=torch.float64)
        if row < len(group):
            expected = weight[group[row]] @ x[row] + (0 if b is None else b[group[row]])
        assert_close(out[row], expected)
    leaves = (x, weight) if b is None else (x, weight, b)
    assert torch.autograd.gradcheck(lambda x, w, *b: grouped_linear(x, w, torch.tensor(counts), *b), leaves)


@pytest.mark.parametrize("counts", [[3, 0, 4, 1], [0, 0, 8, 0], [3, 0, 2, 0]])
def test_grouped_kernel_equals_loop(counts: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch's grouped kernel also runs on the CPU, although Sightline does not use it there."""
    x = torch.randn(8, 16).bfloat16().requires_grad_(True)
    weight = torch.randn(4, 8, 16).bfloat16().requires_grad_(True)
    bias = torch.randn(4, 8).bfloat16().requires_grad_(True)
    results = []
    for kernel in (False, True):
        monkeypatch.setattr(grouped, "_kernel_supports", lambda *_, kernel=kernel: kernel)
        out = grouped_linear(x, weight, torch.tensor(counts), bias)
        results.append((out, *torch.autograd.grad(out, (x, weight, bias), torch.ones_like(out))))
    for loop, fused in zip(*results, strict=True):
        assert_close(loop, fused, atol=0.05, rtol=0.02)
    assert torch.equal(results[1][0][sum(counts) :], torch.zeros(8 - sum(counts), 8).bfloat16())


def test_permute_and_unpermute() -> None:
    tokens, weights = torch.randn(4, 2, dtype=torch.float64), torch.rand(4, 3, dtype=torch.float64)
    permutation = torch.randperm(12)
    rows = permute(tokens, permutation, 3)
    assert torch.equal(rows, tokens[permutation // 3])
    assert_close(unpermute(rows, weights, permutation), tokens * weights.sum(dim=1, keepdim=True))
    leaves = [t.clone().requires_grad_(True) for t in (tokens, rows + torch.randn_like(rows), weights)]
    assert torch.autograd.gradcheck(lambda t: permute(t, permutation, 3), leaves[0])
    assert torch.autograd.gradcheck(lambda r, w: unpermute(r, w, permutation), leaves[1:])


def test_finish_step_literal() -> None:
    router = Router(1, 4, 1, expert_bias_update_rate=0.5)
    router.init_weights(std=1.0)
    router.counts = torch.tensor([7, 1, 2, 2])
    assert router.finish_step() == pytest.approx(7 / 3)
    assert router.expert_bias.tolist() == [-0.5, 0.5, 0.5, 0.5]
    assert router.finish_step() is None, "finish_step resets the counts"
    router.counts = torch.tensor([3, 3, 4, 2])
    router.finish_step()
    assert router.expert_bias.tolist() == [-0.5, 0.5, 0.0, 1.0], "an expert with the mean load keeps its bias"


def test_counts_accumulate_over_micro_batches_in_training_only() -> None:
    moe, x = make_moe(), torch.randn(2, 9, W, dtype=torch.float64)
    full = moe.router(x.flatten(0, 1)).counts
    moe.router.counts = None
    moe(x[:1])
    moe(x[1:])
    assert torch.equal(moe.router.counts, full)
    with torch.no_grad():
        moe(x)
    moe.eval()
    moe(x)
    assert torch.equal(moe.router.counts, full)
    assert list(routers_of(torch.nn.ModuleDict({"a": moe}))) == ["a"]


def test_expert_bias_balances_the_load() -> None:
    """All tokens prefer the same experts, and the router weights are not trained."""
    torch.manual_seed(0)
    router = Router(W, E, 2, score="sigmoid", expert_bias_update_rate=0.02)
    router.init_weights(std=0.3)
    x = torch.randn(2000, W) + 1.0
    loads = []
    for _ in range(150):
        router(x)
        loads.append(float(router.finish_step()))
    assert loads[0] > 2.0
    assert max(loads[-10:]) < 1.15


def test_aux_loss_is_one_for_even_load() -> None:
    router = Router(E, E, 1, aux_loss_coef=0.5)
    router.weight.data = torch.eye(E) * 1e-6
    router(torch.eye(E))
    assert router.aux_loss.item() == pytest.approx(0.5 * E), "coefficient 0.5 times 1 for each of 8 tokens"
    router.weight.data[0] = 5.0
    router(torch.eye(E), torch.arange(E) < 6)
    share = F.softmax(torch.tensor([5.0] + [0.0] * 7), 0)[0].item()
    assert router.aux_loss.item() == pytest.approx(0.5 * E * 6 * share, rel=1e-4), "all 6 tokens select one expert"
    (grad,) = torch.autograd.grad(router.aux_loss, router.weight)
    assert (grad[0, :6] > 0).all(), "gradient descent lowers the score of the overloaded expert"


def test_aux_loss_with_several_experts_per_token() -> None:
    router, x = make_router(aux_loss_coef=1.0), torch.randn(10, W, dtype=torch.float64)
    routing = router(x)
    shares = F.softmax(x @ router.weight.detach().t(), dim=1).mean(dim=0)
    expected = E * sum(int(routing.counts[e]) / (10 * K) * float(shares[e]) for e in range(E))
    assert router.aux_loss.item() / 10 == pytest.approx(expected)
