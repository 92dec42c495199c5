"""Mask making on the device, and compiled graphs over many layouts of documents."""

from __future__ import annotations

import random
from collections.abc import Callable

import torch
from torch._dynamo.utils import counters
from torch.nn.attention.flex_attention import create_block_mask

from benchmarks.gpu.bench import Bench
from benchmarks.gpu.kernels import MAX_GRAPHS, Layer, document_closure
from benchmarks.gpu.steps import Trained
from benchmarks.timing import lognormal_documents, positions_of
from sightline.attention import attend, lower
from sightline.masks import AttentionMask, causal, chunked, document, prefix_lm, shared_prefix, sliding_window
from sightline.models.llama3 import Llama3Config


def mask_making(bench: Bench) -> None:
    """Record the time to build and lower the mask of a row of lognormal documents, against create_block_mask."""
    for length in (512,) if bench.smoke else (8192, 32768, 131072):
        facts = {"S": length}
        if not bench.has_time(8, **facts):
            return
        with bench.attempt(**facts):
            contestants = makers(bench, length)
            names = list(contestants)
            errors = bench.warm_up(contestants)
            times = bench.in_turn(contestants)
            results: dict[str, object] = {**times, **errors}
            bench.record(**facts, **{f"{name}, ms": results[name] for name in names})


def makers(bench: Bench, length: int) -> dict[str, Callable[[], object]]:
    """Return the contestants of a length by name."""
    ids = lognormal_documents(length)
    on_device = ids.to(bench.device)
    closure = document_closure(on_device, None)
    mask = causal(1, length, device=bench.device) & document(on_device)

    def lowered(backend: str) -> object:
        host = causal(1, length) & document(ids)
        training = not bench.smoke
        return lower(host, backend=backend, device=bench.device, dtype=bench.dtype, training=training)

    def theirs(compiled: bool) -> object:
        return create_block_mask(closure, 1, None, length, length, device=bench.device, _compile=compiled)

    return {
        "rule on the device": lambda: causal(1, length, device=bench.device) & document(on_device),
        "BlockMask on the device": mask.to_block_mask,
        "rule on the CPU and inputs of flex": lambda: lowered("flex"),
        "rule on the CPU and inputs of varlen": lambda: lowered("varlen"),
        "create_block_mask": lambda: theirs(compiled=False),
        "create_block_mask, compiled": lambda: theirs(compiled=True),
    }


def random_mask(length: int, seed: int) -> AttentionMask:
    """Return a mask of one of five rules over random documents."""
    ids = lognormal_documents(length, seed=seed)
    order = causal(1, length)
    generator = random.Random(seed)
    positions = positions_of(ids)
    prefix = torch.full_like(positions, generator.randint(1, 200))
    rules: list[Callable[[], AttentionMask]] = [
        lambda: order & document(ids),
        lambda: sliding_window(1, length, generator.randint(1, length // 2)) & document(ids),
        lambda: chunked(positions, generator.randint(16, 512)) & order & document(ids),
        lambda: (prefix_lm(positions, prefix) | order) & document(ids),
        lambda: shared_prefix(ids, ids - ids % generator.randint(2, 6)) & order,
    ]
    return generator.choice(rules)()


def recompiles(bench: Bench) -> None:
    """Record the graphs that torch compiles for attention alone, and for a compiled model, over many layouts."""
    torch._dynamo.config.recompile_limit = MAX_GRAPHS
    with bench.attempt(what="flex, five rules"):
        attention_graphs(bench)
    for backend in ("tiled",) if bench.smoke else ("varlen", "flex"):
        what = f"compiled layers, {backend}"
        if bench.has_time(10, what=what):
            with bench.attempt(what=what):
                model_graphs(bench, backend, what)


def attention_graphs(bench: Bench) -> None:
    """Record the graphs of attention alone: one for each number of intervals, padded to a power of two, is expected."""
    layouts, length = (12, 256) if bench.smoke else (1000, 2048)
    layer = Layer(bench)
    inputs = layer.qkv(length)
    kinds, done = set(), 0
    before = graphs()
    for seed in range(layouts):
        if bench.time_left() < 0.4 * bench.seconds:  # the rest is for the compiled model
            break
        mask = random_mask(length, seed)
        kinds.add(1 << (mask.intervals - 1).bit_length())
        out = attend(*inputs, mask, backend="flex")
        if layer.training:
            torch.autograd.grad(out, inputs, torch.ones_like(out))
        done = seed + 1
    bench.record(
        what="flex, five rules", layouts=done, graphs=graphs() - before, expected=len(kinds),
        intervals=", ".join(map(str, sorted(kinds))),
    )  # fmt: skip


def model_graphs(bench: Bench, backend: str, what: str) -> None:
    """Record the graphs of the first steps of a model with compiled layers, and those of all later steps."""
    config = Llama3Config(vocab_size=512, hidden_size=64 if bench.smoke else 512, num_layers=2)
    trained = Trained(bench, config, rows=1, length=256 if bench.smoke else 2048, layouts=100)
    trained.model.attention_backend = backend
    before, first, steps = graphs(), 0, 0
    while steps < len(trained.batches) and (steps < 10 or bench.time_left() > 3):
        trained.step(trained.batches[steps])
        steps += 1
        first = graphs() - before if steps == 5 else first
    later = graphs() - before - first
    bench.record(what=what, layouts=steps, **{"graphs of the first 5 steps": first, "graphs of the later steps": later})


def graphs() -> int:
    """Number of graphs that torch.compile has compiled in this process."""
    return counters["stats"]["unique_graphs"]
