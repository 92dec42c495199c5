"""Embedding, logits and loss with a vocabulary sharded across two ranks equal those with the full vocabulary."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from sightline.layers import linear_cross_entropy, loss
from sightline.parallel import vocab_parallel
from tests.layers.test_loss import Largest
from tests.support.processes import run_on_ranks

N, W, V = 23, 16, 42


def make_inputs(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """Return hidden [N, W], weight [V, W] and labels [N]: 18 are not -100, with the first and last id of each shard."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(N, W, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(V, W, generator=generator).to(dtype).requires_grad_()
    labels = torch.randint(0, V, (N,), generator=generator)
    labels[:8] = torch.tensor([-100, 0, 20, 21, 41, -100, -100, -100])
    labels[22] = -100
    return hidden, weight, labels


def local_shard(weight: Tensor, mesh: DeviceMesh) -> Tensor:
    """Return this rank's rows of a weight as a leaf tensor."""
    return weight.detach().chunk(2)[mesh.get_local_rank()].requires_grad_(weight.requires_grad)


def run_checks(rank: int) -> None:
    """Run all checks in one process group."""
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("tensor",))
    for chunk_size in (1, 3, 17, 18, 19, 512):
        check_loss_and_gradients(mesh, torch.float64, chunk_size, 1e-12)
    check_loss_and_gradients(mesh, torch.float32, 7, 1e-5)
    for check in CHECKS:
        check(mesh)


def check_loss_and_gradients(mesh: DeviceMesh, dtype: torch.dtype, chunk_size: int, tolerance: float) -> None:
    hidden, weight, labels = make_inputs(dtype)
    part = local_shard(weight, mesh)
    loss = vocab_parallel.token_losses(mesh, hidden, part, labels, chunk_size)
    grads = torch.autograd.grad(loss * 0.37, (hidden, part))
    expected = linear_cross_entropy(hidden, weight, labels, chunk_size)
    grad_hidden, grad_weight = torch.autograd.grad(expected * 0.37, (hidden, weight))
    assert loss.dtype == dtype and loss.shape == ()
    torch.testing.assert_close(loss, expected, atol=0, rtol=tolerance)
    torch.testing.assert_close(grads[0], grad_hidden, atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(grads[1], grad_weight.chunk(2)[mesh.get_local_rank()], atol=tolerance, rtol=tolerance)


def check_weights_and_each_loss(mesh: DeviceMesh) -> None:
    """With labels on the CPU, and with `mask_tokens` as for labels on a device, which computes all tokens."""
    weights = torch.rand(N, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    for select in (loss.select_tokens, loss.mask_tokens):
        hidden, weight, labels = make_inputs(torch.float64)
        part = local_shard(weight, mesh)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(loss, "select_tokens", select)
            each = vocab_parallel.token_losses(mesh, hidden, part, labels, 7, reduction="none")
            value = vocab_parallel.token_losses(mesh, hidden, part, labels, 7, token_weights=weights)
        expected = F.cross_entropy(F.linear(hidden, weight), labels, ignore_index=-100, reduction="none")
        torch.testing.assert_close(each, expected.detach(), atol=1e-12, rtol=1e-12)
        torch.testing.assert_close(value, (expected * weights).sum(), atol=0, rtol=1e-12)
        grads = torch.autograd.grad(value, (hidden, part))
        grad_hidden, grad_weight = torch.autograd.grad((expected * weights).sum(), (hidden, weight))
        torch.testing.assert_close(grads[0], grad_hidden, atol=1e-12, rtol=1e-12)
        torch.testing.assert_close(grads[1], grad_weight.chunk(2)[mesh.get_local_rank()], atol=1e-12, rtol=1e-12)


def check_tokens_without_a_label(mesh: DeviceMesh) -> None:
    hidden, weight, labels = make_inputs()
    with torch.no_grad():
        hidden[labels == -100] = float("nan")
    part = local_shard(weight, mesh)
    loss = vocab_parallel.token_losses(mesh, hidden, part, labels, 4)
    loss.backward()
    assert loss.isfinite() and part.grad.isfinite().all()
    assert torch.equal(hidden.grad[labels == -100], torch.zeros(5, W))
    none = vocab_parallel.token_losses(mesh, hidden, part, torch.full((N,), -100))
    assert none.item() == 0.0 and not any(g.any() for g in torch.autograd.grad(none, (hidden, part)))


def check_extreme_logits(mesh: DeviceMesh) -> None:
    """A label logit 10000 below the greatest, on this rank or the other one, and very negative logits in one shard."""
    for label, expected in ((0, 0.0), (1, 10_000.0)):
        hidden = torch.tensor([[1.0]], requires_grad=True)
        part = local_shard(torch.tensor([[5000.0], [-5000.0]], requires_grad=True), mesh)
        loss = vocab_parallel.token_losses(mesh, hidden, part, torch.tensor([label]))
        loss.backward()
        assert loss.item() == expected and hidden.grad.item() == expected
        assert part.grad.item() == {0: 0.0, 1: [1.0, -1.0][mesh.get_local_rank()]}[label]


def check_frozen_sides(mesh: DeviceMesh) -> None:
    for frozen in (0, 1):
        inputs = make_inputs()
        inputs[frozen].requires_grad_(False)
        part = local_shard(inputs[1], mesh)
        vocab_parallel.token_losses(mesh, inputs[0], part, inputs[2], 5).backward()
        assert (inputs[0].grad is None, part.grad is None) == (frozen == 0, frozen == 1)


def check_full_logits_are_never_materialized(mesh: DeviceMesh) -> None:
    hidden, weight, labels = make_inputs()
    part = local_shard(weight, mesh)
    with torch.no_grad(), Largest() as largest:
        vocab_parallel.token_losses(mesh, hidden, part, labels, 8)
    assert largest.elements == 8 * V // 2


def check_bfloat16(mesh: DeviceMesh) -> None:
    hidden, weight, labels = make_inputs(torch.bfloat16)
    loss = vocab_parallel.token_losses(mesh, hidden, local_shard(weight, mesh), labels, 5)
    expected = F.cross_entropy(hidden.float() @ weight.float().t(), labels, reduction="sum")
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, expected, atol=0, rtol=1e-6)  # with bfloat16 logits, the error would be 1e-3


def check_logits(mesh: DeviceMesh) -> None:
    hidden, weight, _ = make_inputs(torch.float64)
    part = local_shard(weight, mesh)
    factors = torch.randn(N, V, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    logits, expected = vocab_parallel.logits(mesh, hidden, part), F.linear(hidden, weight)
    torch.testing.assert_close(logits, expected, atol=1e-12, rtol=0)
    grads = torch.autograd.grad((logits * factors).sum(), (hidden, part))
    grad_hidden, grad_weight = torch.autograd.grad((expected * factors).sum(), (hidden, weight))
    torch.testing.assert_close(grads[0], grad_hidden, atol=1e-12, rtol=0)
    torch.testing.assert_close(grads[1], grad_weight.chunk(2)[mesh.get_local_rank()], atol=1e-12, rtol=0)


def check_embedding(mesh: DeviceMesh) -> None:
    _, weight, _ = make_inputs()
    embedding = nn.Embedding(V // 2, W)
    embedding.weight = nn.Parameter(local_shard(weight, mesh))
    tokens = torch.tensor([[0, 20, 21, 41, 21], [5, 5, 5, 30, 0]])
    factors = torch.randn(2, 5, W, generator=torch.Generator().manual_seed(3))
    h, expected = vocab_parallel.embed_tokens(embedding, mesh, tokens), F.embedding(tokens, weight)
    assert torch.equal(h, expected)
    (h * factors).sum().backward()
    (grad,) = torch.autograd.grad((expected * factors).sum(), weight)
    torch.testing.assert_close(embedding.weight.grad, grad.chunk(2)[mesh.get_local_rank()])


def check_label_outside_the_vocabulary(mesh: DeviceMesh) -> None:
    hidden, weight, labels = make_inputs()
    for label in (V, -1):
        labels[3] = label
        with pytest.raises(ValueError, match=f"label {label} is outside the vocabulary of 42 tokens; .*0 to 41"):
            vocab_parallel.token_losses(mesh, hidden, local_shard(weight, mesh), labels)


CHECKS = [
    check_weights_and_each_loss,
    check_tokens_without_a_label,
    check_extreme_logits,
    check_frozen_sides,
    check_full_logits_are_never_materialized,
    check_bfloat16,
    check_logits,
    check_embedding,
    check_label_outside_the_vocabulary,
]


def test_two_ranks_equal_one() -> None:
    run_on_ranks(2, run_checks)
