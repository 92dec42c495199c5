"""Time and memory of a training step on packed rows of the corpus: Sightline against the same model in plain PyTorch.

    python -m benchmarks.training_step [--lengths 2048 8192] [--threads 2]

Each contestant runs in a separate process, and they take turns, step by step.

The model has 6 layers, hidden size 256, 8 heads, 4 key/value heads, intermediate size 688, vocabulary 8192, float32.
The plain model has the same weights and uses PyTorch's modules, SDPA, full logits, cross_entropy, clipping and fused
AdamW. It runs with a dense document mask (built from the batch in each step, as trainers do) and with plain causal
attention, where every document leaks into the next. All use the same rows of at least three documents. Mask work is the
time that a step of Sightline spends on masks: rules and lowering.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from benchmarks.timing import machine, processes_in_turn, save
from sightline.attention import lower
from sightline.batch import Batch
from sightline.config import DataConfig, OptimizerConfig
from sightline.data import Loader, Tokenizer, load_documents, train_tokenizer
from sightline.models import build_model
from sightline.models.llama3 import Llama3, Llama3Config
from sightline.parallel.parallel_model import single_process_model
from sightline.training.optimizer import build_optimizer
from sightline.training.step import train_step


class PlainBlock(nn.Module):
    def __init__(self, config: Llama3Config) -> None:
        super().__init__()
        hidden_size, head_dim = config.hidden_size, config.resolved_head_dim
        self.heads, self.kv_heads, self.head_dim = config.num_heads, config.num_kv_heads, head_dim
        self.attention_norm = nn.RMSNorm(hidden_size, config.norm_eps)
        self.query = nn.Linear(hidden_size, config.num_heads * head_dim, bias=False)
        self.key = nn.Linear(hidden_size, config.num_kv_heads * head_dim, bias=False)
        self.value = nn.Linear(hidden_size, config.num_kv_heads * head_dim, bias=False)
        self.attention_output = nn.Linear(config.num_heads * head_dim, hidden_size, bias=False)
        self.mlp_norm = nn.RMSNorm(hidden_size, config.norm_eps)
        self.gate = nn.Linear(hidden_size, config.intermediate_size, bias=False)
        self.up = nn.Linear(hidden_size, config.intermediate_size, bias=False)
        self.down = nn.Linear(config.intermediate_size, hidden_size, bias=False)

    def forward(self, h: Tensor, mask: Tensor | None, cos: Tensor, sin: Tensor) -> Tensor:
        x = self.attention_norm(h)
        q, k, v = (
            linear(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for linear in (self.query, self.key, self.value)
        )
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=True)
        h = h + self.attention_output(out.transpose(1, 2).flatten(2))
        x = self.mlp_norm(h)
        return h + self.down(F.silu(self.gate(x)) * self.up(x))


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


class PlainModel(nn.Module):
    def __init__(self, config: Llama3Config) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(PlainBlock(config) for _ in range(config.num_layers))
        self.norm = nn.RMSNorm(config.hidden_size, config.norm_eps)
        self.output = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    def forward(self, batch: Batch, dense: bool) -> Tensor:
        mask = None
        if dense:
            ids, length = batch.document_ids, batch.shape[1]
            mask = (ids[:, :, None] == ids[:, None, :]).unsqueeze(1)
            mask = mask & torch.ones(length, length, dtype=torch.bool).tril()
        head_dim = self.config.resolved_head_dim
        frequencies = self.config.rope_theta ** -(torch.arange(0, head_dim, 2) / head_dim)
        angles = (batch.positions[:, None, :, None] * frequencies).repeat(1, 1, 1, 2)
        cos, sin = angles.cos(), angles.sin()
        h = self.embedding(batch.tokens)
        for layer in self.layers:
            h = layer(h, mask, cos, sin)
        return self.output(self.norm(h))

    def copy_weights(self, model: Llama3) -> None:
        """Copy the weights of Sightline's model, whose parameters have the same order."""
        with torch.no_grad():
            for parameter, source in zip(self.parameters(), model.parameters(), strict=True):
                parameter.copy_(source)


def rows_of(length: int) -> tuple[Tokenizer, list[Batch]]:
    """Tokenizer, and rows of the corpus with at least three documents, the same for every contestant.

    If rows are too short for three documents, those with the most documents.
    """
    documents = load_documents(DataConfig())
    tokenizer = train_tokenizer(documents, 8192)
    loader = Loader(documents, tokenizer, rows=1, sequence_length=length, seed=1)
    drawn = [next(loader) for _ in range(60)]
    loader.close()
    last_ids = [int(batch.document_ids.max()) for batch in drawn]
    return tokenizer, [row for row, last in zip(drawn, last_ids, strict=True) if last >= min(2, max(last_ids))]


def ours(length: int, threads: int) -> Callable[[], float]:
    """Return a function that takes a step of `sightline train`."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    tokenizer, rows = rows_of(length)
    model = build_model("llama3-tiny")
    optimizer = build_optimizer(model, OptimizerConfig(learning_rate=1e-5))
    alone, following = single_process_model(model), cycle(rows)

    def step() -> float:
        batch = following()
        result = train_step(alone, optimizer, batch, tokenizer, micro_batch_size=1, max_grad_norm=1.0)
        return result.loss.item()

    return step


def plain(length: int, threads: int, dense: bool) -> Callable[[], float]:
    """Return a function that takes a step of the plain model, with a dense document mask or leaky causal attention."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    _, rows = rows_of(length)
    source = build_model("llama3-tiny")
    model = PlainModel(source.config)
    model.copy_weights(source)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, weight_decay=0.1, fused=True)
    following = cycle(rows)

    def step() -> float:
        batch = following()
        optimizer.zero_grad(set_to_none=True)
        logits = model(batch, dense)
        loss = F.cross_entropy(logits.flatten(0, 1), batch.labels.flatten(), ignore_index=-100)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return loss.item()

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[2048, 8192])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    threads = options.threads
    table = Table(title=f"training step, {machine()}, {threads} threads")
    for name in ("S", "contestant", "tokens/s", "peak MiB", "ours is faster by"):
        table.add_column(name, justify="left" if name == "contestant" else "right")
    results: list[dict[str, object]] = []
    for length in options.lengths:
        measured = processes_in_turn(
            {
                "ours": (ours, (length, threads)),
                "dense mask": (plain, (length, threads, True)),
                "leaky causal": (plain, (length, threads, False)),
            },
            options.rounds,
        )
        _, rows = rows_of(length)
        our_seconds = measured["ours"][0]
        share = mask_work(build_model("llama3-tiny"), rows) / our_seconds
        for name, (seconds, peak) in measured.items():
            row = {"length": length, "contestant": name, "tokens_per_second": length / seconds, "peak_mib": peak}
            results.append(
                {**row, "ours_times": seconds / our_seconds, "mask_share": share if name == "ours" else None}
            )
            table.add_row(str(length), name, f"{length / seconds:.0f}", f"{peak:.0f}", f"{seconds / our_seconds:.2f}x")
        table.add_section()
        Console().print(f"S = {length}: mask work is {share:.2%} of our step")
    Console().print(table)
    save(f"training-step-{threads}t", results)


def cycle(rows: list[Batch]) -> Callable[[], Batch]:
    """Return a function that returns the next row of a list, endlessly."""
    index = -1

    def following() -> Batch:
        nonlocal index
        index = (index + 1) % len(rows)
        return rows[index]

    return following


def mask_work(model: Llama3, rows: list[Batch]) -> float:
    """Median seconds that one step spends on masks: rules and lowering."""
    times = []
    for batch in rows[:15]:
        begin = time.perf_counter()
        mask = model.get_attention_masks(batch)
        lower(mask, device="cpu", dtype=torch.float32, training=True)
        times.append(time.perf_counter() - begin)
    return sorted(times)[len(times) // 2]


if __name__ == "__main__":
    main()
