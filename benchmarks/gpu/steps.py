"""A training step on packed rows in bfloat16 with compiled layers, with several kinds of masks in turn."""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

from benchmarks.gpu.bench import Bench
from benchmarks.gpu.kernels import MAX_GRAPHS, document_closure
from benchmarks.timing import packed_rows
from sightline.attention.flex import Flex
from sightline.batch import IGNORE, Batch
from sightline.config import OptimizerConfig
from sightline.models import build_model, config_of
from sightline.models.llama3 import Llama3Config
from sightline.parallel.compile import apply_compile
from sightline.parallel.parallel_model import single_process_model
from sightline.training.flops import find_peak
from sightline.training.optimizer import build_optimizer
from sightline.training.step import train_step

RATE = 1e-5
TURNS_SECONDS = 5.0
OURS = "auto"
CONTESTANTS = (OURS, "dense mask", "create_block_mask", "flex")
"""Attention of the model: the backend that `auto` chooses, SDPA with a dense mask, flex with the usual closure and
create_block_mask in each step, and flex with our masks."""
BACKEND_OF = {"dense mask": "sdpa", "create_block_mask": "flex"}
SMALL = Llama3Config(
    vocab_size=50_304, hidden_size=768, num_layers=12, num_heads=12, num_kv_heads=12, intermediate_size=2048,
    tied_embeddings=True,
)  # fmt: skip
TINY = Llama3Config(
    vocab_size=512, hidden_size=64, num_layers=2, num_heads=4, num_kv_heads=2, intermediate_size=128,
    tied_embeddings=True,
)  # fmt: skip


class Trained:
    """A model with its optimizer and batches of random tokens in lognormal documents.

    layouts  number of batches, each with another layout of documents
    """

    def __init__(
        self, bench: Bench, config: Llama3Config, *, rows: int, length: int, layouts: int, compiled: bool = True
    ) -> None:
        torch._dynamo.config.recompile_limit = MAX_GRAPHS
        torch.manual_seed(0)
        self.bench, self.config = bench, config
        with bench.device:
            self.model = build_model(config)
        if compiled:
            # On a CPU the compiler's backend takes minutes and gains nothing: capture the same graphs without it.
            apply_compile(self.model, backend="aot_eager" if bench.smoke else "inductor")
        self.dtype = "float32" if bench.smoke else "bfloat16"
        self.parallel = single_process_model(self.model, dtype=self.dtype)
        self.optimizer = build_optimizer(self.parallel, OptimizerConfig(learning_rate=RATE))
        self.batches = [packed_rows(length, config.vocab_size, seed, rows=rows) for seed in range(layouts)]

    def step(self, batch: Batch) -> None:
        """Run a step of `sightline train`, without reading its results."""
        rows = batch.shape[0]
        train_step(self.parallel, self.optimizer, batch, None, micro_batch_size=rows, max_grad_norm=1.0)

    def steps(self, contestant: str) -> None:
        """Run a step on each batch with the attention of a contestant."""
        self.model.attention_backend = BACKEND_OF.get(contestant, contestant)
        for batch in self.batches:
            with torch_block_mask(batch) if contestant == "create_block_mask" else nullcontext():
                self.step(batch)

    def contestants(self) -> dict[str, Callable[[], object]]:
        return {name: functools.partial(self.steps, name) for name in CONTESTANTS}

    def tokens(self) -> int:
        return sum(batch.tokens.numel() for batch in self.batches)

    def flops(self) -> float:
        """FLOPs of a step on each batch: matrix products, and attention of the visible pairs only."""
        pairs = sum(int(self.model.get_attention_masks(batch).visible_pairs().sum()) for batch in self.batches)
        return self.model.flops_per_token() * self.tokens() + pairs * self.model.flops_per_pair("attention")


def torch_block_mask(batch: Batch) -> AbstractContextManager[object]:
    """Let the flex backend build its BlockMask with create_block_mask from the document ids, as other trainers do."""
    rows, length = batch.shape

    def lower(self: Flex, mask: object, requirements: Any) -> BlockMask:
        closure = document_closure(batch.document_ids.to(requirements.device), None)
        return create_block_mask(closure, rows, None, length, length, device=requirements.device, _compile=True)

    return patch.object(Flex, "lower", lower)


def small_model(bench: Bench) -> None:
    """A model of 125M parameters, also without compilation, and against transformers."""
    rows, length = (2, 128) if bench.smoke else (2, 8192)
    config = TINY if bench.smoke else SMALL
    trained = Trained(bench, config, rows=rows, length=length, layouts=4)
    eager = Trained(bench, config, rows=rows, length=length, layouts=4, compiled=False)
    compiled = trained.contestants()
    # Those that compile nothing come before the others, which may take all the time that is left.
    runs: dict[str, Callable[[], object]] = {
        OURS: compiled.pop(OURS),
        "auto, not compiled": functools.partial(eager.steps, OURS),
    }
    with bench.attempt(contestant="transformers"):
        name, theirs = transformers_steps(bench, trained)
        runs[name] = theirs
    measure(bench, trained, {**runs, **compiled})


def large_model(bench: Bench) -> None:
    """Train as many layers of the 8B model as fit, on a row of 8192 tokens; fewer if memory runs out."""
    config = config_of("llama3-8b")
    length = 128 if bench.smoke else 8192
    layers = 2 if bench.smoke else fitting_layers(config, length)
    while layers:
        shape = replace(TINY, num_layers=layers) if bench.smoke else replace(config, num_layers=layers)
        trained = None
        try:
            trained = Trained(bench, shape, rows=1, length=length, layouts=2)
            trained.steps(OURS)
            bench.synchronize()
            break
        except torch.OutOfMemoryError:
            bench.record(contestant=f"{layers} layers", error="out of memory")
            layers = layers * 3 // 4
        del trained
        torch.cuda.empty_cache()
    else:
        return
    measure(bench, trained, trained.contestants())


def fitting_layers(config: Llama3Config, length: int) -> int:
    """Estimate how many layers fit: 16 bytes a parameter for training in float32, 2 for its copy in bfloat16."""
    free, _ = torch.cuda.mem_get_info()
    hidden, head_dim = config.hidden_size, config.resolved_head_dim
    heads = config.num_heads + 2 * config.num_kv_heads
    layer = hidden * (head_dim * (heads + config.num_heads) + 3 * config.intermediate_size)
    # Saved for the backward in bfloat16: inputs of norms and matrix products, queries, keys and values, the three
    # intermediate tensors of the feed-forward layer.
    activations = 2 * length * (8 * hidden + 2 * head_dim * heads + 3 * config.intermediate_size)
    head = 18 * 2 * config.vocab_size * hidden
    reserve = 6 * 2**30  # chunks of logits, temporaries of the optimizer, the allocator
    return max(1, int((0.92 * free - head - reserve) / (18 * layer + activations)))


def measure(bench: Bench, trained: Trained, runs: dict[str, Callable[[], object]]) -> None:
    """Record each contestant alone when it is warm, then all of them in turn.

    A contestant starts only if there is time for the warm-up of the slowest so far, and to take turns.
    """
    shape = {"layers": trained.config.num_layers, "rows": trained.batches[0].shape[0], "S": trained.batches[0].shape[1]}
    peak = find_peak(bench.device, trained.dtype)
    tokens, flops = trained.tokens(), trained.flops()
    memory: dict[str, float] = {}
    kernels: dict[str, str] = {}
    warm: dict[str, Callable[[], object]] = {}

    def facts(milliseconds: float) -> dict[str, object]:
        rate = {"ms a step": milliseconds / len(trained.batches), "tokens/s": 1e3 * tokens / milliseconds}
        return {**rate, "MFU of visible pairs": f"{flops / (milliseconds / 1e3) / peak.flops:.1%}"}

    slowest = 0.0
    for name, run in runs.items():
        if not bench.has_time(slowest + TURNS_SECONDS, contestant=name, **shape):
            continue
        begin = bench.time_left()
        with bench.attempt(contestant=name, **shape):
            for _ in range(2):
                run()
            if bench.device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            alone = bench.milliseconds(run)
            if bench.device.type == "cuda":
                memory[name] = torch.cuda.max_memory_allocated() / 2**30
            bench.record(contestant=name, **shape, **facts(alone), provisional=True)
            warm[name] = run
            if name in CONTESTANTS:
                kernels[name] = trained.model.attention_kernels["attention"].split(":")[0]
        slowest = max(slowest, begin - bench.time_left())
    before = counters["stats"]["unique_graphs"]
    times = bench.in_turn(warm)
    compiled = counters["stats"]["unique_graphs"] - before
    for name, milliseconds in times.items():
        results = {"kernel": kernels.get(name), **facts(milliseconds), "peak GiB": memory.get(name)}
        if OURS in times:
            results["auto is faster by"] = f"{milliseconds / times[OURS]:.2f}x"
        bench.record(contestant=name, **shape, **results)
    bench.record(contestant=f"(peak of the card: {peak}; graphs compiled while they took turns: {compiled})")


def transformers_steps(bench: Bench, trained: Trained) -> tuple[str, Callable[[], object]]:
    """Return the name and the steps of transformers' model of the same config, on the same packed rows.

    It finds the documents by their position_ids. With FlashAttention where that is installed, otherwise with SDPA.
    """
    if importlib.util.find_spec("transformers") is None:
        raise ModuleNotFoundError("transformers is not installed")
    transformers: Any = importlib.import_module("transformers")
    kind = "flash_attention_2" if importlib.util.find_spec("flash_attn") else "sdpa"
    config = trained.config
    theirs = transformers.LlamaConfig(
        vocab_size=config.vocab_size, hidden_size=config.hidden_size, num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads, num_key_value_heads=config.num_kv_heads,
        intermediate_size=config.intermediate_size, tie_word_embeddings=config.tied_embeddings,
        max_position_embeddings=trained.batches[0].shape[1], attn_implementation=kind,
    )  # fmt: skip
    with bench.device:
        model = transformers.LlamaForCausalLM(theirs)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.1, fused=True)

    def loss_of(batch: Batch) -> Tensor:
        on_device = batch.to(bench.device)
        with torch.autocast(bench.device.type, dtype=torch.bfloat16, enabled=not bench.smoke):
            positions = on_device.positions.long()
            logits = model(input_ids=on_device.tokens, position_ids=positions, use_cache=False).logits
            return F.cross_entropy(logits.flatten(0, 1).float(), on_device.labels.flatten(), ignore_index=IGNORE)

    def steps() -> None:
        for batch in trained.batches:
            optimizer.zero_grad(set_to_none=True)
            loss_of(batch).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()

    return f"transformers, {kind}, not compiled", steps
