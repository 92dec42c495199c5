"""How keys and whole rows start_exchange between processes that share rows, and their gradients back."""

from __future__ import annotations

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
from sightline.parallel.mesh import Mesh
from tests.masks.test_block_mask import assert_same_blocks
from tests.parallel.context.rows import LENGTH, LENGTHS, pack
from tests.support.lowering import lowered
from tests.support.processes import on_processes

ROWS = len(LENGTHS)
CPU = torch.device("cpu")
NO_COMPILER = pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile on a CPU needs g++")
SLOW_FLEX = pytest.param("flex", marks=[pytest.mark.slow, NO_COMPILER])


def masks_of_rows() -> dict[str, AttentionMask]:
    ids = pack(LENGTHS).document_ids
    before = causal(ROWS, LENGTH) & document(ids)
    return {"causal": before, "window": before & sliding_window(ROWS, LENGTH, 5), "both": document(ids)}


def share(
    whole: AttentionMask, degree: int, order: Any, family: str = "llama3-debug"
) -> tuple[ContextShard, Exchange, Tensor]:
    """This process's part of a mask, as shard_inputs makes it, its exchange, and its tokens [B, S / degree]."""
    mesh = Mesh(ParallelConfig(context=degree, context_order=order), CPU)
    inputs = {"tokens": torch.arange(LENGTH).expand(ROWS, -1), "attention_masks": whole}
    inputs = shard_inputs(inputs, build_skeleton(family), mesh)
    shard = inputs["attention_masks"]["attention"]
    return shard, bind(shard), inputs["tokens"]


def bind(shard: ContextShard) -> Exchange:
    return ContextExchange(dist.group.WORLD).bind(shard, CPU)[1]


def take(x: Tensor, own: Tensor) -> Tensor:
    """Of x [B, heads, S, D] the own tokens [B, s]."""
    return x.gather(2, own[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3]))


def everyone(value: Tensor) -> list[Tensor]:
    """That of every process, by rank."""
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def gathers(rank: int, degree: int, cases: list[tuple[str, str]]) -> None:
    for name, order in cases:
        whole = masks_of_rows()[name]
        shard, exchange, own = share(whole, degree, order)
        mask = shard.mask
        k, v = random(ROWS, 2, LENGTH, 4), random(ROWS, 3, LENGTH, 2, seed=1)
        own_k, own_v = (take(x, own).requires_grad_() for x in (k, v))
        came_k, came_v = exchange.start(own_k, own_v).wait()
        needed = whole.take_queries(own).to_dense().any(dim=1)  # [B, S]
        assert came_k.shape == (ROWS, 2, mask.key_length, 4) and came_v.shape == (ROWS, 3, mask.key_length, 2)
        weight = random(*came_k.shape, seed=2 + rank)
        expected = torch.zeros_like(k)
        for row in range(ROWS):
            places = needed[row].nonzero().flatten()
            for came, x in ((came_k, k), (came_v, v)):
                assert torch.equal(came[row, :, : len(places)], x[row][:, places]), "in the order of the row"
                assert not came[row, :, len(places) :].any(), "and nothing else"
            expected[row][:, places] = weight[row, :, : len(places)]
        (came_k * weight).sum().backward()
        assert torch.allclose(own_k.grad, take(torch.stack(everyone(expected)).sum(dim=0), own), rtol=1e-12)
        assert not own_v.grad.any()
        dense = torch.zeros(ROWS, own.shape[1], LENGTH, dtype=torch.bool)
        for row in range(ROWS):
            places = needed[row].nonzero().flatten()
            dense[row][:, places] = mask.to_dense()[row, :, : len(places)]
        assert torch.equal(dense, whole.take_queries(own).to_dense())


def test_the_needed_keys_come_in_the_order_of_the_row_and_gradients_return_and_add() -> None:
    on_processes(2, gathers, 2, [("causal", "balanced"), ("window", "roundrobin"), ("both", "contiguous")])


def test_on_four_processes() -> None:
    on_processes(4, gathers, 4, [("causal", "headtail"), ("window", "balanced"), ("both", "roundrobin")])


def walks(rank: int, degree: int) -> None:
    _, exchange, own = share(masks_of_rows()["causal"], degree, "balanced", "qwen3_next-debug")
    assert exchange.full_mask.equal(masks_of_rows()["causal"])
    x, y = random(ROWS, LENGTH, 8), random(ROWS, LENGTH, 4, seed=1)
    own_x, own_y = (t.gather(1, own[..., None].expand(-1, -1, t.shape[2])).requires_grad_() for t in (x, y))
    whole_x, whole_y = exchange.to_full_rows(own_x, own_y)
    assert torch.equal(whole_x, x.chunk(degree, dim=2)[rank]) and torch.equal(whole_y, y.chunk(degree, dim=2)[rank])
    assert torch.equal(exchange.to_local_tokens(whole_x), own_x)
    weight = random(degree, ROWS, LENGTH, 8 // degree, seed=2)
    (whole_x * weight[rank]).sum().backward()
    expected = torch.cat(list(weight), dim=-1).gather(1, own[..., None].expand(-1, -1, 8))
    assert torch.equal(own_x.grad, expected)
    channels = torch.arange(8)
    assert torch.equal(exchange.local_channels(channels), channels.chunk(degree)[rank])


@pytest.mark.parametrize("degree", [2, 4])
def test_whole_rows_of_some_channels_and_back(degree: int) -> None:
    on_processes(degree, walks, degree)


def cuts(rank: int) -> None:
    shard, exchange, own = share(masks_of_rows()["window"], 2, "balanced", "qwen3_next-debug")
    k = take(random(ROWS, 2, LENGTH, 4), own)
    (whole,) = exchange.start(k).wait()
    leaves = pytree.tree_leaves(shard)
    assert all(isinstance(leaf, Tensor) and leaf.shape[0] == ROWS for leaf in leaves), "tensors only, B first"
    assert torch.equal(bind(pytree.tree_map(lambda leaf: leaf, shard)).start(k).wait()[0], whole)
    _, parts = split_args_kwargs_into_chunks((), {"k": k, "shard": shard}, ROWS)
    for row, part in enumerate(parts):  # as a pipeline cuts it
        assert type(part["shard"]) is ContextShard and part["shard"].mask.shape == (1, *shard.mask.shape[1:])
        exchange = bind(part["shard"])
        assert torch.equal(exchange.start(part["k"]).wait()[0], whole[row : row + 1])
        (x,) = exchange.to_full_rows(part["k"].transpose(1, 2).flatten(2))
        assert torch.equal(exchange.to_local_tokens(x), part["k"].transpose(1, 2).flatten(2))


def test_a_pipeline_cuts_the_mask_and_its_ways_along_the_rows() -> None:
    on_processes(2, cuts)


def meets(rank: int) -> bool:
    """Rank 1 sends nothing before rank 0, which has sent already, has met it."""
    _, exchange, own = share(masks_of_rows()["both"], 2, "roundrobin")
    others = dist.new_group([0, 1])
    k = take(random(ROWS, 2, LENGTH, 4), own)
    if rank == 1:
        dist.barrier(others)
    pending = exchange.start(k)
    if rank == 0:
        dist.barrier(others)
    (came,) = pending.wait()
    return bool(came.any())


def test_nobody_waits_between_sending_and_collecting() -> None:
    assert on_processes(2, meets, timeout=120) == [True, True]


def hides(rank: int) -> list[str]:
    """What happens in a layer, forward and backward, in its order."""
    shard, made, _ = share(masks_of_rows()["causal"], 2, "balanced")
    mask = lowered(shard.mask, exchange=made)
    attention = build_model("llama3-debug").layers["0"].attention
    told: list[str] = []

    def tell(name: str) -> None:
        original = getattr(exchange, name)

        def telling(*args: Any) -> Tensor:
            told.append(name)
            return original(*args)

        setattr(exchange, name, telling)

    tell("all_to_all")
    tell("wait")
    attention.query.register_forward_hook(lambda *_: told.append("queries"))
    attention.query.register_full_backward_hook(lambda *_: told.append("their gradients"))
    attention(torch.randn(*shard.mask.shape[:2], 64, requires_grad=True), mask, None).sum().backward()
    return told


def test_queries_and_their_gradients_are_made_while_keys_and_theirs_are_under_way() -> None:
    expected = ["all_to_all", "queries", "wait", "all_to_all", "their gradients", "wait"]
    assert on_processes(2, hides) == [expected, expected]


def looks(rank: int, degree: int, order: str) -> None:
    """Change one token: what may not see it keeps every bit, in the outputs and in the gradients."""
    torch.manual_seed(0)
    model = build_model("llama3-debug")
    mesh = Mesh(ParallelConfig(context=degree, context_order=order), CPU)
    apply_context(model, mesh)
    batch = pack(LENGTHS)
    facts = {"positions": batch.positions, "attention_masks": model.get_attention_masks(batch)}
    sees = facts["attention_masks"].to_dense()

    def run(tokens: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
        """Logits of the own tokens, and the gradient of all embeddings [B, S, W] of a loss on the wanted tokens."""
        inputs = shard_inputs({"tokens": tokens, "labels": places, **facts}, model, mesh)
        h = model.embedding(inputs["tokens"]).detach().requires_grad_()
        masks = model.lower_masks(inputs["attention_masks"], h)
        h_last = model.layers(h, masks, model.encode_positions(inputs["positions"]), None)
        logits = model.output(model.norm(h_last))
        (logits.square().sum(dim=2) * wanted.gather(1, inputs["labels"])).sum().backward()
        return logits.detach(), h.grad

    places = torch.arange(LENGTH).expand(ROWS, -1).contiguous()
    own = shard_inputs({"tokens": places, "labels": places, **facts}, model, mesh)["labels"]
    for row, token in ((0, 20), (0, 50), (1, 30), (2, 1), (4, 1)):
        changed = batch.tokens.clone()
        changed[row, token] += 1
        blind = torch.ones(ROWS, LENGTH, dtype=torch.bool)
        blind[row] = ~sees[row, :, token]
        before, gradient = run(batch.tokens, blind.double())
        after, changed_gradient = run(changed, blind.double())
        mine = blind.gather(1, own)
        assert torch.equal(before[mine], after[mine]), (row, token)
        assert not (~mine).any() or not torch.equal(before[~mine], after[~mine])
        assert torch.equal(gradient[mine], changed_gradient[mine])
        assert not gradient[row][own[row] == token].any()


@pytest.mark.parametrize("order", ["balanced", "roundrobin"])
def test_needle_across_processes(order: str) -> None:
    on_processes(2, looks, 2, order)


@pytest.mark.parametrize("backend", ["sdpa", "reference", SLOW_FLEX])
def test_backends_attend_over_received_keys(backend: str) -> None:
    """Q is not T: against the rows as a whole."""
    for whole in masks_of_rows().values():
        q, k, v = (random(ROWS, heads, LENGTH, 16, seed=heads).float() for heads in (4, 2, 2))
        expected = attend(q, k, v, whole, backend="reference")
        plan = plan_context(whole, 4, "roundrobin")
        for rank in range(4):
            own, view = plan.queries(rank), plan.shard(rank)
            needed = whole.take_queries(own).to_dense().any(dim=1)
            received = torch.zeros(2, ROWS, 2, view.mask.key_length, 16)
            for row in range(ROWS):
                places = needed[row].nonzero().flatten()
                for side, x in zip(received, (k, v), strict=True):
                    side[row, :, : len(places)] = x[row][:, places]
            with torch.no_grad():
                out = attend(take(q, own), *received, view.mask, backend=backend)
            torch.testing.assert_close(out, take(expected, own), rtol=1e-5, atol=1e-5)
            assert_same_blocks(view.mask, 16)


def test_varlen_refuses_other_keys_than_its_queries() -> None:
    view = plan_context(masks_of_rows()["causal"], 2, "contiguous").shard(1)
    with pytest.raises(ValueError, match=r"Q=26 and T=128"):
        view.mask.to_varlen()


class Sizes:
    """A mesh as `check_context` asks it, of processes that are not there."""

    def __init__(self, **sizes: int) -> None:
        self.sizes = {"context": 1, "tensor": 1, **sizes}

    def size(self, axis: str) -> int:
        return self.sizes[axis]


@pytest.mark.parametrize(
    ("family", "sizes", "length", "text"),
    [
        ("llama3-debug", {"context": 3}, 1024, "sequence-length 1023 or 1026, or parallel.context 2 or 4"),
        ("llama3-debug", {"context": 2048}, 1024, "sequence-length 2048, or parallel.context 1024"),
        ("qwen3_next-debug", {"context": 4}, 64, "does not divide the 2 key heads .* use parallel.context 2"),
        ("qwen3_next-debug", {"context": 2, "tensor": 2}, 64, "the 1 key heads .* use parallel.context 1"),
    ],
)
def test_degrees_that_do_not_fit_are_refused(family: str, sizes: dict[str, int], length: int, text: str) -> None:
    mesh: Any = Sizes(**sizes)
    with pytest.raises(ValueError, match=text):
        check_context(build_skeleton(family), mesh, length)
    check_context(build_skeleton("llama3-debug"), mesh, 2048 * 3)


def test_one_process_keeps_its_rows() -> None:
    mask = masks_of_rows()["causal"]
    tokens = torch.zeros(ROWS, LENGTH, dtype=torch.int64)
    inputs = {"tokens": tokens, "attention_masks": {"attention": mask}}
    assert shard_inputs(inputs, build_skeleton("llama3-debug"), Mesh(ParallelConfig(shard=1), CPU)) == inputs
    bound, exchange = LocalExchanges().bind(mask, CPU)
    assert bound is mask and exchange.full_mask is mask
    assert exchange.start(tokens).wait()[0] is tokens and exchange.to_full_rows(tokens)[0] is tokens


def attends(rank: int) -> None:
    """The plan, the shard and the exchange around an attention that knows nothing of this package's layers."""
    whole = masks_of_rows()["window"]
    q, k, v = (random(ROWS, 2, LENGTH, 4, seed=seed) for seed in range(3))
    expected = attend(q, k, v, whole, backend="reference")
    plan = plan_context(whole, 2)
    own = plan.queries(rank)
    mask, exchange = ContextExchange(dist.group.WORLD).bind(plan.shard(rank), CPU)
    own_k, own_v = exchange.start(take(k, own), take(v, own)).wait()
    visible = mask.to_dense().unsqueeze(1)
    seeing = visible.any(dim=3, keepdim=True)
    out = F.scaled_dot_product_attention(take(q, own), own_k, own_v, attn_mask=visible | ~seeing)
    torch.testing.assert_close(out * seeing, take(expected, own))


def test_a_shard_and_its_exchange_serve_other_attention() -> None:
    on_processes(2, attends)
