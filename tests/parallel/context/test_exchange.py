"""Exchange of keys, full rows and their gradients between context-parallel ranks."""

from __future__ import annotations

import math
import shutil
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.pipelining.microbatch import split_args_kwargs_into_chunks
from torch.utils import _pytree as pytree

from sightline.attention import Exchange, LocalExchanges, attend
from sightline.config import ParallelConfig
from sightline.masks import AttentionMask, causal, document, sliding_window
from sightline.models import build_model, build_skeleton
from sightline.parallel import plan_context
from sightline.parallel.context import exchange
from sightline.parallel.context.apply import apply_context, check_context, shard_inputs
from sightline.parallel.context.exchange import ContextExchange
from sightline.parallel.context.shard import ContextShard
from sightline.parallel.mesh import Degrees, Mesh
from tests.masks.test_block_mask import assert_same_blocks
from tests.parallel.context.rows import LENGTH, LENGTHS, pack
from tests.support.lowering import lowered
from tests.support.processes import run_on_ranks

ROWS = len(LENGTHS)
CPU = torch.device("cpu")
NO_COMPILER = pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile on a CPU needs g++")
SLOW_FLEX = pytest.param("flex", marks=[pytest.mark.slow, NO_COMPILER])


def masks_of_rows() -> dict[str, AttentionMask]:
    ids = pack(LENGTHS).document_ids
    before = causal(ROWS, LENGTH) & document(ids)
    return {"causal": before, "window": before & sliding_window(ROWS, LENGTH, 5), "both": document(ids)}


def shard_mask(
    full_mask: AttentionMask, degree: int, order: Any, family: str = "llama3-debug"
) -> tuple[ContextShard, Exchange, Tensor]:
    """This rank's shard of a mask from shard_inputs, its exchange, and its tokens [B, S / degree]."""
    mesh = Mesh(ParallelConfig(context=degree, context_order=order), CPU)
    inputs = {"tokens": torch.arange(LENGTH).expand(ROWS, -1), "attention_masks": full_mask}
    inputs = shard_inputs(inputs, build_skeleton(family), mesh)
    shard = inputs["attention_masks"]["attention"]
    return shard, bind(shard), inputs["tokens"]


def bind(shard: ContextShard) -> Exchange:
    return ContextExchange(dist.group.WORLD).bind(shard, CPU)[1]


def take(x: Tensor, tokens: Tensor) -> Tensor:
    """x [B, heads, S, D] at tokens [B, N] -> [B, heads, N, D]."""
    return x.gather(2, tokens[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3]))


def gather_from_ranks(value: Tensor) -> list[Tensor]:
    """The value of every rank."""
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def exchange_keys(rank: int, degree: int, cases: list[tuple[str, str]]) -> None:
    for name, order in cases:
        full_mask = masks_of_rows()[name]
        shard, exchange, local_tokens = shard_mask(full_mask, degree, order)
        mask = shard.mask
        k, v = random(ROWS, 2, LENGTH, 4), random(ROWS, 3, LENGTH, 2, seed=1)
        local_k, local_v = (take(x, local_tokens).requires_grad_() for x in (k, v))
        received_k, received_v = exchange.start(local_k, local_v).wait()
        needed = full_mask.take_queries(local_tokens).to_dense().any(dim=1)  # [B, S]
        assert received_k.shape == (ROWS, 2, mask.key_length, 4) and received_v.shape == (ROWS, 3, mask.key_length, 2)
        weight = random(*received_k.shape, seed=2 + rank)
        expected = torch.zeros_like(k)
        for row in range(ROWS):
            keys = needed[row].nonzero().flatten()
            for received, x in ((received_k, k), (received_v, v)):
                assert torch.equal(received[row, :, : len(keys)], x[row][:, keys]), "received keys are in row order"
                assert not received[row, :, len(keys) :].any(), "the rest is zero"
            expected[row][:, keys] = weight[row, :, : len(keys)]
        (received_k * weight).sum().backward()
        assert torch.allclose(
            local_k.grad, take(torch.stack(gather_from_ranks(expected)).sum(dim=0), local_tokens), rtol=1e-12
        )
        assert not local_v.grad.any()
        dense = torch.zeros(ROWS, local_tokens.shape[1], LENGTH, dtype=torch.bool)
        for row in range(ROWS):
            keys = needed[row].nonzero().flatten()
            dense[row][:, keys] = mask.to_dense()[row, :, : len(keys)]
        assert torch.equal(dense, full_mask.take_queries(local_tokens).to_dense())


def test_needed_keys_arrive_in_row_order_and_their_gradients_are_summed() -> None:
    run_on_ranks(2, exchange_keys, 2, [("causal", "balanced"), ("window", "roundrobin"), ("both", "contiguous")])


def test_needed_keys_on_four_ranks() -> None:
    run_on_ranks(4, exchange_keys, 4, [("causal", "headtail"), ("window", "balanced"), ("both", "roundrobin")])


def exchange_rows(rank: int, degree: int) -> None:
    _, exchange, local_tokens = shard_mask(masks_of_rows()["causal"], degree, "balanced", "qwen3_next-debug")
    assert exchange.full_mask.equal(masks_of_rows()["causal"])
    x, y = random(ROWS, LENGTH, 8), random(ROWS, LENGTH, 4, seed=1)
    local_x, local_y = (
        t.gather(1, local_tokens[..., None].expand(-1, -1, t.shape[2])).requires_grad_() for t in (x, y)
    )
    full_x, full_y = exchange.to_full_rows(local_x, local_y)
    assert torch.equal(full_x, x.chunk(degree, dim=2)[rank]) and torch.equal(full_y, y.chunk(degree, dim=2)[rank])
    assert torch.equal(exchange.to_local_tokens(full_x), local_x)
    weight = random(degree, ROWS, LENGTH, 8 // degree, seed=2)
    (full_x * weight[rank]).sum().backward()
    expected = torch.cat(list(weight), dim=-1).gather(1, local_tokens[..., None].expand(-1, -1, 8))
    assert torch.equal(local_x.grad, expected)
    channels = torch.arange(8)
    assert torch.equal(exchange.local_channels(channels), channels.chunk(degree)[rank])


@pytest.mark.parametrize("degree", [2, 4])
def test_exchange_to_full_rows_and_its_inverse(degree: int) -> None:
    run_on_ranks(degree, exchange_rows, degree)


def split_shard(rank: int) -> None:
    shard, exchange, local_tokens = shard_mask(masks_of_rows()["window"], 2, "balanced", "qwen3_next-debug")
    k = take(random(ROWS, 2, LENGTH, 4), local_tokens)
    (full_k,) = exchange.start(k).wait()
    leaves = pytree.tree_leaves(shard)
    assert all(isinstance(leaf, Tensor) and leaf.shape[0] == ROWS for leaf in leaves), (
        "a shard has only tensors with B first"
    )
    assert torch.equal(bind(pytree.tree_map(lambda leaf: leaf, shard)).start(k).wait()[0], full_k)
    _, parts = split_args_kwargs_into_chunks((), {"k": k, "shard": shard}, ROWS)
    for row, part in enumerate(parts):  # as a pipeline splits it into micro-batches
        assert type(part["shard"]) is ContextShard and part["shard"].mask.shape == (1, *shard.mask.shape[1:])
        exchange = bind(part["shard"])
        assert torch.equal(exchange.start(part["k"]).wait()[0], full_k[row : row + 1])
        (x,) = exchange.to_full_rows(part["k"].transpose(1, 2).flatten(2))
        assert torch.equal(exchange.to_local_tokens(x), part["k"].transpose(1, 2).flatten(2))


def test_a_pipeline_splits_the_shard_along_the_rows() -> None:
    run_on_ranks(2, split_shard)


def send_late(rank: int) -> bool:
    """Rank 1 starts its exchange only after rank 0 has started its own and reached the barrier."""
    _, exchange, local_tokens = shard_mask(masks_of_rows()["both"], 2, "roundrobin")
    barrier_group = dist.new_group([0, 1])
    k = take(random(ROWS, 2, LENGTH, 4), local_tokens)
    if rank == 1:
        dist.barrier(barrier_group)
    pending = exchange.start(k)
    if rank == 0:
        dist.barrier(barrier_group)
    (received,) = pending.wait()
    return bool(received.any())


def test_start_does_not_block() -> None:
    assert run_on_ranks(2, send_late, timeout=120) == [True, True]


def record_calls(rank: int) -> list[str]:
    """The order of communication and query projection in the forward and backward of an attention layer."""
    shard, key_exchange, _ = shard_mask(masks_of_rows()["causal"], 2, "balanced")
    mask = lowered(shard.mask, exchange=key_exchange)
    attention = build_model("llama3-debug").layers["0"].attention
    calls: list[str] = []

    def record(name: str) -> None:
        original = getattr(exchange, name)

        def recording(*args: Any) -> Tensor:
            calls.append(name)
            return original(*args)

        setattr(exchange, name, recording)

    record("all_to_all")
    record("wait")
    attention.query.register_forward_hook(lambda *_: calls.append("queries"))
    attention.query.register_full_backward_hook(lambda *_: calls.append("query gradients"))
    attention(torch.randn(*shard.mask.shape[:2], 64, requires_grad=True), mask, None).sum().backward()
    return calls


def test_query_projection_overlaps_with_communication() -> None:
    expected = ["all_to_all", "queries", "wait", "all_to_all", "query gradients", "wait"]
    assert run_on_ranks(2, record_calls) == [expected, expected]


def check_leakage(rank: int, degree: int, order: str) -> None:
    """Perturb one token: outputs and gradients of tokens that do not attend to it stay equal to the bit."""
    torch.manual_seed(0)
    model = build_model("llama3-debug")
    mesh = Mesh(ParallelConfig(context=degree, context_order=order), CPU)
    apply_context(model, mesh)
    batch = pack(LENGTHS)
    per_row = {"positions": batch.positions, "attention_masks": model.get_attention_masks(batch)}
    visible = per_row["attention_masks"].to_dense()

    def run(tokens: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
        """Logits of the local tokens, and the gradient of their embeddings [B, S / degree, hidden_size], for a loss on
        the tokens where `wanted` [B, S] is 1."""
        inputs = shard_inputs({"tokens": tokens, "labels": indices, **per_row}, model, mesh)
        h = model.embedding(inputs["tokens"]).detach().requires_grad_()
        masks = model.lower_masks(inputs["attention_masks"], h)
        h_last = model.layers(h, masks, model.encode_positions(inputs["positions"]), None)
        logits = model.output(model.norm(h_last))
        (logits.square().sum(dim=2) * wanted.gather(1, inputs["labels"])).sum().backward()
        return logits.detach(), h.grad

    indices = torch.arange(LENGTH).expand(ROWS, -1).contiguous()
    local_tokens = shard_inputs({"tokens": indices, "labels": indices, **per_row}, model, mesh)["labels"]
    for row, token in ((0, 20), (0, 50), (1, 30), (2, 1), (4, 1)):
        changed = batch.tokens.clone()
        changed[row, token] += 1
        unaffected = torch.ones(ROWS, LENGTH, dtype=torch.bool)
        unaffected[row] = ~visible[row, :, token]
        before, gradient = run(batch.tokens, unaffected.double())
        after, changed_gradient = run(changed, unaffected.double())
        local = unaffected.gather(1, local_tokens)
        assert torch.equal(before[local], after[local]), (row, token)
        assert not (~local).any() or not torch.equal(before[~local], after[~local])
        assert torch.equal(gradient[local], changed_gradient[local])
        assert not gradient[row][local_tokens[row] == token].any()


@pytest.mark.parametrize("order", ["balanced", "roundrobin"])
def test_no_leakage_across_ranks(order: str) -> None:
    run_on_ranks(2, check_leakage, 2, order)


@pytest.mark.parametrize("backend", ["sdpa", "reference", SLOW_FLEX])
def test_backends_attend_over_received_keys(backend: str) -> None:
    """Local queries over received keys (Q != T) give the outputs of the full rows."""
    for full_mask in masks_of_rows().values():
        q, k, v = (random(ROWS, heads, LENGTH, 16, seed=heads).float() for heads in (4, 2, 2))
        expected = attend(q, k, v, full_mask, backend="reference")
        plan = plan_context(full_mask, 4, "roundrobin")
        for rank in range(4):
            local_tokens, shard = plan.queries(rank), plan.shard(rank)
            needed = full_mask.take_queries(local_tokens).to_dense().any(dim=1)
            received = torch.zeros(2, ROWS, 2, shard.mask.key_length, 16)
            for row in range(ROWS):
                keys = needed[row].nonzero().flatten()
                for side, x in zip(received, (k, v), strict=True):
                    side[row, :, : len(keys)] = x[row][:, keys]
            with torch.no_grad():
                out = attend(take(q, local_tokens), *received, shard.mask, backend=backend)
            torch.testing.assert_close(out, take(expected, local_tokens), rtol=1e-5, atol=1e-5)
            assert_same_blocks(shard.mask, 16)


def test_varlen_rejects_a_shard_with_more_keys_than_queries() -> None:
    shard = plan_context(masks_of_rows()["causal"], 2, "contiguous").shard(1)
    with pytest.raises(ValueError, match=r"Q=26 and T=128"):
        shard.mask.to_varlen()


@pytest.mark.parametrize(
    ("family", "sizes", "length", "text"),
    [
        ("llama3-debug", {"context": 3}, 1024, "sequence-length 1023 or 1026, or parallel.context 2 or 4"),
        ("llama3-debug", {"context": 2048}, 1024, "sequence-length 2048, or parallel.context 1024"),
        ("qwen3_next-debug", {"context": 4}, 64, "does not divide the 2 key heads .* use parallel.context 2"),
        ("qwen3_next-debug", {"context": 2, "tensor": 2}, 64, "the 1 key heads .* use parallel.context 1"),
    ],
)
def test_invalid_degrees_are_rejected(family: str, sizes: dict[str, int], length: int, text: str) -> None:
    degrees = Degrees(ParallelConfig(**sizes), math.prod(sizes.values()))
    with pytest.raises(ValueError, match=text):
        check_context(build_skeleton(family), degrees, length)
    check_context(build_skeleton("llama3-debug"), degrees, 2048 * 3)


def test_one_process_keeps_full_rows() -> None:
    mask = masks_of_rows()["causal"]
    tokens = torch.zeros(ROWS, LENGTH, dtype=torch.int64)
    inputs = {"tokens": tokens, "attention_masks": {"attention": mask}}
    assert shard_inputs(inputs, build_skeleton("llama3-debug"), Mesh(ParallelConfig(shard=1), CPU)) == inputs
    bound, exchange = LocalExchanges().bind(mask, CPU)
    assert bound is mask and exchange.full_mask is mask
    assert exchange.start(tokens).wait()[0] is tokens and exchange.to_full_rows(tokens)[0] is tokens


def run_torch_attention(rank: int) -> None:
    """Use the plan, the shard and the exchange with PyTorch's attention instead of this package's layers."""
    full_mask = masks_of_rows()["window"]
    q, k, v = (random(ROWS, 2, LENGTH, 4, seed=seed) for seed in range(3))
    expected = attend(q, k, v, full_mask, backend="reference")
    plan = plan_context(full_mask, 2)
    local_tokens = plan.queries(rank)
    mask, exchange = ContextExchange(dist.group.WORLD).bind(plan.shard(rank), CPU)
    received_k, received_v = exchange.start(take(k, local_tokens), take(v, local_tokens)).wait()
    visible = mask.to_dense().unsqueeze(1)
    attends_to_any = visible.any(dim=3, keepdim=True)
    out = F.scaled_dot_product_attention(
        take(q, local_tokens), received_k, received_v, attn_mask=visible | ~attends_to_any
    )
    torch.testing.assert_close(out * attends_to_any, take(expected, local_tokens))


def test_shard_and_exchange_work_with_torch_attention() -> None:
    run_on_ranks(2, run_torch_attention)
